"""What the GPU kernels of linear attention are given, computed by XLA and differentiated by jax.

All of it is small beside the tokens, but for what the delta rule solves within each chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gates import Exact, Rows, in_chunks, make_rows
from pallas_kernels.linear.gpu_layout import from_chunks
from pallas_kernels.linear.inverse import unit_lower_inverse
from pallas_kernels.linear.options import Inputs, Options
from pallas_kernels.linear.states import initial_state, restart_state

TINY = 1e-30
"""The least weight of a token that is not 0, in float32."""


class Prepared(NamedTuple):
    """Float32, b over N and P; the tokens are padded to whole chunks. None: not needed.

    Attributes:
      queries_low, keys_low: `[b, H, T]`: between tokens j <= i lies the factor
        exp(queries_i - keys_j), each the sum of this and of `Constants.high`.
      enter, restart: `[b, H, T]`, factors of the states in what a query finds, times the scale.
      leave: `[b, H, T]`, factor of what a token writes in the state after its chunk.
      keep, again: `[b, H n, hk]`, factors in the state after a chunk of the one before it, and of
        the one that documents start from.
      before: `[b, H, T]`, what a normalized output is divided by, but for the tokens of its chunk.
      normalizer: `[N, P, H, hk]`, after the last token.
      written: `[b, T, H, hv]`, with the delta rule: what a chunk would write after a zero state.
      found: `[b, T, H, hk]`, with the delta rule: for a state S it writes `found S` more.
    """

    queries_low: Float[Array, "b H T"]
    keys_low: Float[Array, "b H T"]
    enter: Float[Array, "b H T"]
    restart: Float[Array, "b H T"] | None
    leave: Float[Array, "b H T"]
    keep: Float[Array, "b Hn hk"]
    again: Float[Array, "b Hn hk"] | None
    before: Float[Array, "b H T"] | None
    normalizer: Float[Array, "N P H hk"] | None
    written: Float[Array, "b T H hv"] | None
    found: Float[Array, "b T H hk"] | None


class Constants(NamedTuple):
    """What has no gradient, `[b, H, T]`.

    Attributes:
      high: of the exponents of queries and of keys.
      document: of each token, as a float32; or None.
      floor: least divisor of a normalized output; or None.
      maximum: `[N, P, H]`, of a normalized state; or None.
    """

    high: Float[Array, "b H T"]
    document: Float[Array, "b H T"] | None
    floor: Float[Array, "b H T"] | None
    maximum: Float[Array, "N P H"] | None


def prepare(options: Options, inputs: Inputs) -> tuple[Prepared, Constants]:
    """Of float32 inputs."""
    rows = make_rows(options, inputs)
    N, P, T, _, hk = inputs.k.shape
    H = inputs.v.shape[3]
    n = -(-T // options.chunk)
    shape = (n, N, P, H, options.chunk)

    def flat(x):
        """`[n, N, P, H, C]` as `[b, H, T]`."""
        x = jnp.moveaxis(jnp.broadcast_to(x, shape), 0, 3)
        return x.reshape(N * P, H, -1)

    def by_key(x):
        """`[n, N, P, H]` as `[b, H n, hk]`."""
        x = jnp.moveaxis(jnp.broadcast_to(x, shape[:4]), 0, 3).reshape(N * P, H * n, 1)
        return jnp.broadcast_to(x, (N * P, H * n, hk))

    one, zero = jnp.ones(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
    total = Exact(zero, zero) if rows.total is None else rows.total
    enter, leave = (
        one if x is None else jnp.broadcast_to(x, shape) for x in (rows.enter, rows.leave)
    )
    keys_low, before, normalizer, written, found = total.low, None, None, None, None
    if inputs.beta is not None:
        written, found = _solve(options, inputs, rows, enter)
    elif rows.weight is not None:
        keys_low = keys_low - jnp.log(jnp.maximum(rows.weight, TINY))
        leave = leave * rows.weight
    if options.normalize:
        before, normalizer = _normalizers(options, inputs, rows, leave)
    has_restart = rows.restart is not None
    prepared = Prepared(
        queries_low=flat(total.low),
        keys_low=flat(keys_low),
        enter=flat(enter * options.scale),
        restart=flat(rows.restart * options.scale) if has_restart else None,
        leave=flat(leave),
        keep=by_key(enter[..., -1]),
        again=by_key(rows.keep_restart) if has_restart else None,
        before=flat(before) if options.normalize else None,
        normalizer=normalizer,
        written=written,
        found=found,
    )
    constants = Constants(
        high=flat(total.high),
        document=None if rows.documents is None else flat(rows.documents.astype(jnp.float32)),
        floor=flat(rows.floor) if options.normalize else None,
        maximum=rows.maximum,
    )
    return prepared, jax.lax.stop_gradient(constants)


def _normalizers(options, inputs, rows, leave):
    """What a query finds of the normalizers before its chunk, and the last normalizer."""
    n, N, P, H, C = leave.shape
    q, k = (in_chunks(x, C) for x in inputs[:2])
    K, hk = k.shape[-2:]
    grouped = lambda x: x.reshape(*x.shape[:3], K, H // K, *x.shape[4:])
    added = jnp.einsum("nbpckd,nbpkgc->nbpkgd", k, grouped(leave)).reshape(n, N, P, H, hk)
    begin, again = (s(options, inputs).normalizer for s in (initial_state, restart_state))
    if rows.restart is not None:
        added = added + rows.keep_restart[..., None] * again
    keep = rows.keep[..., None]
    added = added.at[0].add(keep[0] * begin)

    def after(one, two):
        return one[0] * two[0], two[0] * one[1] + two[1]

    _, after_chunks = jax.lax.associative_scan(after, (keep, added))
    normalizers = jnp.concatenate([begin[None], after_chunks[:-1]])

    def find(normalizer, factor):
        found = jnp.einsum("nbpckd,nbpkgd->nbpkgc", q, grouped(normalizer))
        return found.reshape(n, N, P, H, C) * factor * options.scale

    found = find(normalizers, rows.enter)
    if rows.restart is not None:
        found = found + find(jnp.broadcast_to(again, normalizers.shape), rows.restart)
    return found, after_chunks[-1]


def _solve(options, inputs, rows, enter):
    H, K = inputs.v.shape[3], inputs.k.shape[3]
    k = jnp.moveaxis(in_chunks(inputs.k, options.chunk), 3, 4)
    of_heads = lambda x: jnp.repeat(x, H // K, axis=3)
    overlap, k = of_heads(k @ k.mT), of_heads(k)
    seen = jnp.tri(options.chunk, dtype=bool)
    if rows.documents is not None:
        seen &= rows.documents[..., :, None] == rows.documents[..., None, :]
    if rows.total is not None:
        fade = rows.total[..., :, None] - rows.total[..., None, :]
        overlap = overlap * jnp.exp(jnp.where(seen, fade, 0.0))
    restarting = None if rows.restart is None else rows.restart[..., None] * k
    return solve(
        options, inputs, rows, jnp.where(seen, overlap, 0.0), enter[..., None] * k, restarting
    )


def solve(options: Options, inputs: Inputs, rows: Rows, overlap, entering, restarting):
    """`Prepared.written` and `Prepared.found`, by (I + A)^-1 (arXiv 2406.06484).

    Args:
      overlap: `[n, N, P, H, C, C]`, products of keys that see each other, with their decay.
      entering, restarting: `[n, N, P, H, C, hk]`, keys by what they find of the state before the
        chunk, and of the one that documents start from (or None).
    """
    weight = rows.weight[..., None]
    inverse = unit_lower_inverse(jnp.tril(overlap, -1) * weight)
    written = weight * jnp.moveaxis(in_chunks(inputs.v, options.chunk), 3, 4)
    if restarting is not None:
        written = written - weight * restarting @ restart_state(options, inputs).matrix
    return from_chunks(inverse @ written), from_chunks(-inverse @ (weight * entering))
