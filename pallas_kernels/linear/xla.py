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
    N, P, T, K, hk = inputs.q.shape
    H, hv = inputs.v.shape[3:]
    rows = make_rows(options, inputs)
    # Axes [n, N, P, H, C, h]; those of q and k have K for H where one serves several value heads.
    q, k, v = (jnp.moveaxis(in_chunks(x.astype(wide), options.chunk), 3, 4) for x in inputs[:3])
    n, C = q.shape[0], options.chunk
    q = q * options.scale
    per_key = rows.total is not None and rows.total.high.ndim == 6

    def spread(x):
        return x if x.shape[3] == H else jnp.repeat(x, H // K, axis=3)

    visible = jnp.tri(C, dtype=bool)
    if rows.documents is not None:
        visible &= rows.documents[..., :, None] == rows.documents[..., None, :]
    if per_key:
        q, k = spread(q), spread(k)
        products = lambda x: jnp.where(visible, decayed_products(x, k, rows.total), 0)
    elif rows.total is None:
        products = lambda x: jnp.where(visible, spread(x @ k.mT), 0)
    else:
        fade = rows.total[..., :, None] - rows.total[..., None, :]
        fade = jnp.exp(jnp.where(visible, fade, -jnp.inf))
        products = lambda x: spread(x @ k.mT) * fade

    def times(factor, x):
        """`x` times a factor of `Rows`."""
        if factor is None:
            return spread(x)
        return spread(x) * (factor if factor.ndim == 6 else factor[..., None])

    scores = products(q)
    written = v if rows.weight is None else rows.weight[..., None] * v
    leaving = times(rows.leave, k)
    begin, again = initial_state(options, inputs), restart_state(options, inputs)
    keep = jnp.ones((), wide) if rows.keep is None else rows.keep
    keep = keep if keep.ndim in (0, 5) else keep[..., None]
    S0 = again.matrix
    if inputs.beta is not None:
        overlap = jnp.tril(products(k), -1) * rows.weight[..., None]
        inverse = unit_lower_inverse(overlap)
        weighted = lambda factor: times(factor, k) * rows.weight[..., None]
        found = inverse @ weighted(rows.enter)
        if rows.restart is not None:
            written = written - weighted(rows.restart) @ S0
        written = inverse @ written
        moved = -(leaving.mT @ found)
    added = leaving.mT @ written
    if rows.restart is not None:
        again_kept = rows.keep_restart
        again_kept = again_kept if again_kept.ndim == 5 else again_kept[..., None]
        added = added + again_kept[..., None] * S0

    def step(S, chunk):
        keep, moved, added = chunk
        after = keep[..., None] * S + added
        return (after if moved is None else after + moved @ S), S

    keep = jnp.broadcast_to(keep, (n, *jnp.broadcast_shapes(keep.shape[1:], (N, P, H, 1))))
    moved = None if inputs.beta is None else moved
    S, starts = jax.lax.scan(step, begin.matrix, (keep, moved, added))
    if inputs.beta is not None:
        written = written - found @ starts
    out = times(rows.enter, q) @ starts + scores @ written
    if rows.restart is not None:
        out = out + times(rows.restart, q) @ S0
    normalizer, normalizers = None, None
    if options.normalize:
        weight = rows.weight[..., None]
        added = jnp.sum(leaving * weight, -2)
        if rows.restart is not None:
            added = added + rows.keep_restart[..., None] * again.normalizer

        def sum_step(x, chunk):
            keep, added = chunk
            return keep * x + added, x

        normalizer, normalizers = jax.lax.scan(sum_step, begin.normalizer, (keep, added))
        sums = times(rows.enter, q) @ normalizers[..., None] + scores @ weight
        if rows.restart is not None:
            sums = sums + times(rows.restart, q) @ again.normalizer[..., None]
        out = out / jnp.maximum(jnp.abs(sums), rows.floor[..., None])
    out = jnp.moveaxis(out, (0, 4), (2, 3)).reshape(N, P, n * C, H, hv)[:, :, :T]
    end = NormalizedState(S, normalizer, rows.maximum)
    states = NormalizedState(starts, normalizers, None) if save else None
    return out.astype(inputs.v.dtype), end, states
