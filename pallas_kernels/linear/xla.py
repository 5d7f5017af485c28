"""Linear attention in chunks of products, for any platform, differentiated by jax itself.

Within a chunk the pairs of tokens are a masked product, as in attention; from chunk to chunk goes
the state. All chunks are computed together but for the states, over which a scan runs: with the
delta rule S' = (keep - Z^T W) S + Z^T U, where what a chunk writes is U - W S (the WY form of
arXiv 2406.06484), so that a step is one product.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.linear.gates import in_chunks, make_rows
from pallas_kernels.linear.inverse import unit_lower_inverse
from pallas_kernels.linear.options import Inputs, NormalizedState, Options
from pallas_kernels.linear.pairs import decayed_products
from pallas_kernels.linear.states import initial_state, restart_state, wide_type

CHUNK = 64


def chunkwise(options: Options, inputs: Inputs) -> tuple[Array, NormalizedState]:
    """The output, like v, and the state after the last token."""
    return forward(options, inputs, save=False)[:2]


def forward(options: Options, inputs: Inputs, save: bool):
    """By the contract of `pallas_kernels.linear.api`."""
    precision = "highest" if wide_type(inputs) == inputs.q.dtype else None
    with jax.default_matmul_precision(precision):
        return _forward(options, inputs, save)


def backward(options: Options, inputs: Inputs, out, starts, dout, dend) -> Inputs:
    """By the contract of `pallas_kernels.linear.api`."""
    del out, starts
    documents = inputs.documents
    take = lambda x: chunkwise(options, x._replace(documents=documents))
    _, pull = jax.vjp(take, inputs._replace(documents=None))
    return pull((dout, dend))[0]


def _forward(options, inputs, save):
    wide = wide_type(inputs)
    N, P, T, K, _ = inputs.q.shape
    H, C = inputs.v.shape[3], options.chunk
    rows = make_rows(options, inputs)
    q, k, v = (_heads_first(x.astype(wide), C) for x in inputs[:3])
    begin, again = initial_state(options, inputs), restart_state(options, inputs)
    S, S0 = begin.matrix, again.matrix
    if options.normalize:
        # The normalizer is what the matrix would hold of one more value, which is always 1.
        v = jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1)
        S = jnp.concatenate([S, begin.normalizer[..., None]], -1)
        S0 = jnp.concatenate([S0, again.normalizer[..., None]], -1)

    def of_heads(x):
        return x if x.shape[3] == H else jnp.repeat(x, H // K, axis=3)

    def times(factor, x):
        """`x` times a factor of `Rows`, for each value head."""
        return of_heads(x) if factor is None else of_heads(x) * _column(factor, x)

    scores, overlap = _pairs(options, rows, of_heads, q, k, delta=inputs.beta is not None)
    written = v if rows.weight is None else rows.weight[..., None] * v
    leaving = times(rows.leave, k).mT
    moved = None
    if inputs.beta is not None:
        inverse = unit_lower_inverse(jnp.tril(overlap, -1) * rows.weight[..., None])
        weighted = of_heads(k) * rows.weight[..., None]
        found = inverse @ times(rows.enter, weighted)
        if rows.restart is not None:
            written = written - times(rows.restart, weighted) @ S0
        written = inverse @ written
        moved = -(leaving @ found)
    added = leaving @ written
    if rows.restart is not None:
        added = added + _column(rows.keep_restart, added) * S0
    keep = None if rows.keep is None else _column(rows.keep, added)

    def step(S, chunk):
        keep, moved, added = chunk
        after = added + (S if keep is None else keep * S)
        return (after if moved is None else after + moved @ S), S

    S, starts = jax.lax.scan(step, S, (keep, moved, added))
    if moved is not None:
        written = written - found @ starts
    q = q * options.scale
    out = times(rows.enter, q) @ starts + scores @ written
    if rows.restart is not None:
        out = out + times(rows.restart, q) @ S0
    end, starts = NormalizedState(S, None, None), NormalizedState(starts, None, None)
    if options.normalize:
        out = out[..., :-1] / jnp.maximum(jnp.abs(out[..., -1:]), rows.floor[..., None])
        end, starts = (
            NormalizedState(x.matrix[..., :-1], x.matrix[..., -1], None) for x in (end, starts)
        )
    out = jnp.moveaxis(out, (0, 4), (2, 3))
    out = out.reshape(N, P, -1, H, out.shape[-1])[:, :, :T]
    end = end._replace(maximum=rows.maximum)
    return out.astype(inputs.v.dtype), end, starts if save else None


def _pairs(options, rows, of_heads, q, k, delta):
    """Products of queries with keys, and (None without the delta rule) of keys with keys, for the
    pairs of each chunk that see each other: `[n, N, P, H, C, C]`."""
    visible = jnp.tri(q.shape[4], dtype=bool)
    if rows.documents is not None:
        visible &= rows.documents[..., :, None] == rows.documents[..., None, :]
    xs = (q * options.scale, k) if delta else (q * options.scale,)
    if rows.total is None:
        products = [jnp.where(visible, of_heads(x @ k.mT), 0) for x in xs]
    elif rows.total.high.ndim == 6:
        products = decayed_products([of_heads(x) for x in xs], of_heads(k), rows.total)
        products = [jnp.where(visible, x, 0) for x in products]
    else:
        fade = rows.total[..., :, None] - rows.total[..., None, :]
        fade = jnp.exp(jnp.where(visible, fade, -jnp.inf))
        products = [of_heads(x @ k.mT) * fade for x in xs]
    return (*products, None)[:2]


def _heads_first(x, chunk):
    """`x` `[N, P, T, H, h]` in chunks, `[n, N, P, H, C, h]`."""
    return jnp.moveaxis(in_chunks(x, chunk), 3, 4)


def _column(factor, x):
    """`factor` with axes of size 1 at the end, as many as `x` has axes."""
    return factor.reshape(*factor.shape, *[1] * (x.ndim - factor.ndim))
