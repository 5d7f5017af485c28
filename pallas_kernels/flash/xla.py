"""Attention in plain XLA operations: the CPU path, and that of every platform without a kernel.

Short queries (decoding) take `plain`, which holds all scores. Longer ones take `tiled`: for each
block of queries a loop over blocks of keys, with a running softmax, so that no more than a tile of
scores exists, and it lies in cache. The backward pass computes the tiles again.

Arrays here have the axes `[N, P, T, K, G, h]`: N all leading axes but the last (P), and the query
heads as G for each of K key/value heads.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.masks import Mask

TILED_FROM = 128  # queries
BLOCK = 64  # queries, and keys, of a tile
TILE_SCORES = 2**15  # of the (sequence, head) pairs that are computed together
# XLA's CPU backend runs a small product on one core: so many independent ones occupy several.
CHAINS = 4


class Options(NamedTuple):
    """What is known when tracing."""

    causal: bool
    scale: float
    soft_cap: float | None


def attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    mask: Mask,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "*lead T H h"], Float[Array, "*lead T H"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    lead, (T, H, h), (S, K, _) = q.shape[:-3], q.shape[-3:], k.shape[-3:]
    N, P = math.prod(lead[:-1]), math.prod(lead[-1:])
    form = plain if T < TILED_FROM else tiled
    out, lse = form(
        Options(mask.causal, scale, soft_cap),
        q.reshape(N, P, T, K, H // K, h),
        k.reshape(N, P, S, K, h),
        v.reshape(N, P, S, K, h),
        _fold_lead(mask.intervals, lead),
        prefix,
    )
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _fold_lead(intervals, lead):
    """Intervals `[..., R, 2, S]` as `[N, P, R, 2, S]`, where both of N and P may be 1."""
    if intervals is None:
        return None
    *axes, R, two, S = intervals.shape
    axes = axes + [1] * (len(lead) - len(axes))
    last = axes[-1] if axes else 1
    rows = 1
    if any(n > 1 for n in axes[:-1]):
        rows = math.prod(lead[:-1])
        intervals = jnp.broadcast_to(
            intervals.reshape(*axes, R, two, S), (*lead[:-1], last, R, two, S)
        )
    return intervals.reshape(rows, last, R, two, S)


def plain(options, q, k, v, intervals, prefix):
    """All scores at once.

    Args:
      q: `[N, P, T, K, G, h]`.
      k, v: `[N, P, S, K, h]`.
      intervals: `[N or 1, P or 1, R, 2, S]` or None.
      prefix: None or keys and values `[P, K, M, h]`.

    Returns:
      output like q and float32 log-sum-exp `[N, P, T, K, G]`.
    """
    T, S = q.shape[2], k.shape[2]

    def scores(equation, keys):
        s = jnp.einsum(equation, q, keys, preferred_element_type=jnp.float32) * options.scale
        return _cap(options, s)

    s = scores("nptkgh,npskh->npkgts", k)
    if options.causal or intervals is not None:
        visible = masks.dense(Mask(intervals, options.causal), T, S)
        s = jnp.where(jnp.expand_dims(visible, (-3, -4)), s, -jnp.inf)
    top = jnp.max(s, -1, keepdims=True, initial=-jnp.inf)
    if prefix is not None:
        s_prefix = scores("nptkgh,pkmh->npkgtm", prefix[0])
        top = jnp.maximum(top, jnp.max(s_prefix, -1, keepdims=True, initial=-jnp.inf))
    top = lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0.0))
    p = jnp.exp(s - top)
    total = jnp.sum(p, -1, keepdims=True)
    out = _weighted("npkgts,npskh->nptkgh", p, v)
    if prefix is not None:
        p_prefix = jnp.exp(s_prefix - top)
        total += jnp.sum(p_prefix, -1, keepdims=True)
        # XLA on CPU has no bfloat16 product that gives float32 in the order of `out`.
        prefix_out = _weighted("npkgtm,pkmh->pkngth", p_prefix, prefix[1])
        out += prefix_out.transpose(2, 0, 4, 1, 3, 5)
    sees = total > 0.0
    lse = jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)
    total = jnp.where(sees, total, 1.0)
    total, lse = (x[..., 0].transpose(0, 1, 4, 2, 3) for x in (total, lse))
    return (out / total[..., None]).astype(q.dtype), lse


def _weighted(equation, p, v):
    return jnp.einsum(equation, p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _cap(options, s):
    return s if options.soft_cap is None else options.soft_cap * jnp.tanh(s / options.soft_cap)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def tiled(options, q, k, v, intervals, prefix):
    """The same as `plain`, with the same arguments, tile by tile."""
    return _forward(options, q, k, v, intervals, prefix)[0]


class Tiling(NamedTuple):
    """How the work is cut. A pair is one key/value head of one sequence.

    Attributes:
      rows: entries of axis N in one step of the outer loop; its pairs are `chunks` in turn of
        `chains` side by side of `pairs` in one product.
      q_blocks, k_blocks: blocks along T and S, the last one padded.
      last_keys: keys of the last block of keys.
    """

    rows: int
    chunks: int
    chains: int
    pairs: int
    q_blocks: int
    k_blocks: int
    last_keys: int


def _tiling(q, k, prefix) -> Tiling:
    N, P, T, K, G, _ = q.shape
    S = k.shape[2]
    most = max(1, TILE_SCORES // (G * BLOCK**2))
    # Rows that share a step would each need their own copy of the prefix.
    rows = 1 if prefix is not None else _divisor(N, CHAINS * most // (P * K))
    pairs = _divisor(P * K, most)
    chains = _divisor(rows * P * K // pairs, CHAINS)
    k_blocks = -(-S // BLOCK)
    return Tiling(
        rows=rows,
        chunks=rows * P * K // pairs // chains,
        chains=chains,
        pairs=pairs,
        q_blocks=-(-T // BLOCK),
        k_blocks=k_blocks,
        last_keys=S - (k_blocks - 1) * BLOCK,
    )


def _divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, and at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def _forward(options, q, k, v, intervals, prefix):
    tiling = _tiling(q, k, prefix)
    prefix_chains = _prefix_chains(tiling, prefix)
    edge_bias = _edge_bias(options, tiling, intervals, q.shape[4])

    def chunk(x):
        return _forward_chunk(options, tiling, edge_bias, *x)

    def step(rows):
        q, k, v, intervals = rows
        blocks = (_to_blocks(tiling, x) for x in (q, k, v))
        runs = _mask_blocks(tiling, intervals, k.shape)
        out, lse = lax.map(chunk, (*blocks, runs, prefix_chains))
        lse = tuple(x[..., None] for x in lse)
        return (
            _from_blocks(out, q.shape, q.dtype),
            _from_blocks(lse, (*q.shape[:-1], 1), jnp.float32),
        )

    out, lse = lax.map(step, tuple(_by_rows(tiling, x, q) for x in (q, k, v, intervals)))
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
    return (out, lse), (q, k, v, intervals, prefix, out, lse)


def _forward_chunk(options, tiling, edge_bias, q, k, v, runs, prefix):
    """Output and log-sum-exp of some chains; all arguments and results are tuples over chains."""
    pairs, rows, h = q[0].shape[1:]
    heads = rows // BLOCK

    def see(state, q, k, v, bias=None):
        top, total, out = state
        s = _cap(options, _dot(q, k, 2, 2))
        if bias is not None:
            s = s + bias
        new_top = jnp.maximum(top, jnp.max(s, -1, initial=-jnp.inf))
        base = jnp.where(new_top > -jnp.inf, new_top, 0.0)
        p = jnp.exp(s - base[..., None])
        kept = jnp.exp(top - base)
        return (
            new_top,
            total * kept + jnp.sum(p, -1),
            out * kept[..., None] + _dot(p, v, 2, 1),
        )

    def block(_, x):
        i, q = x
        q = [part * options.scale for part in q]

        def tile(states, j, edge):
            biases = _biases(tiling, runs, i, j, edge_bias if edge else (), heads)
            return tuple(map(see, states, q, _at(k, j), _at(v, j), biases))

        nothing = jnp.zeros((pairs, rows), jnp.float32)
        state = (nothing - jnp.inf, nothing, jnp.zeros((pairs, rows, h), jnp.float32))
        states = (state,) * tiling.chains
        if prefix is not None:
            states = tuple(map(see, states, q, *prefix))
        return None, tuple(
            map(finish, *zip(*_over_keys(options, tiling, i, tile, states), strict=True))
        )

    def finish(top, total, out):
        sees = total > 0.0
        total = jnp.where(sees, total, 1.0)
        return out / total[..., None], jnp.where(sees, top + jnp.log(total), -jnp.inf)

    ends = lax.scan(block, None, (jnp.arange(tiling.q_blocks), q))[1]
    return tuple(zip(*ends, strict=True))


def _backward(options, saved, cotangents):
    q, k, v, intervals, prefix, out, lse = saved
    tiling = _tiling(q, k, prefix)
    prefix_chains = _prefix_chains(tiling, prefix)
    edge_bias = _edge_bias(options, tiling, intervals, q.shape[4], transposed=True)

    def chunk(x):
        return _backward_chunk(options, tiling, edge_bias, *x)

    def step(dprefix, rows):
        q, k, v, intervals, out, lse, dout, dlse = rows
        # The softmax's own gradient: p (dp - delta); the log-sum-exp's: p dlse.
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1) - dlse
        # A row that sees nothing gets probabilities exp(s - inf) = 0.
        lse = jnp.where(lse > -jnp.inf, lse, jnp.inf)
        blocks = [_to_blocks(tiling, x) for x in (q, k, v, dout, lse[..., None], delta[..., None])]
        runs = _mask_blocks(tiling, intervals, k.shape)
        dq, dk, dv, dp = lax.map(chunk, (*blocks, runs, prefix_chains))
        grads = (
            _from_blocks(dq, q.shape, q.dtype),
            _from_blocks(dk, k.shape, k.dtype),
            _from_blocks(dv, v.shape, v.dtype),
        )
        return jax.tree.map(jnp.add, dprefix, dp), grads

    arrays = (q, k, v, intervals, out, lse, *cotangents)
    dprefix = jax.tree.map(jnp.zeros_like, prefix_chains)
    dprefix, grads = lax.scan(step, dprefix, tuple(_by_rows(tiling, x, q) for x in arrays))
    dq, dk, dv = (d.reshape(x.shape) for d, x in zip(grads, (q, k, v), strict=True))
    if prefix is not None:
        dprefix = tuple(
            jnp.stack(d, 1).reshape(x.shape).astype(x.dtype)
            for d, x in zip(dprefix, prefix, strict=True)
        )
    return dq, dk, dv, None, dprefix


def _backward_chunk(options, tiling, edge_bias, q, k, v, dout, lse, delta, runs, prefix):
    """Gradients of q, k, v and prefix; all arguments and results are tuples over chains.

    Scores are transposed, `[keys, queries]`: then no product here transposes an operand as large
    as a tile, which costs as much as the product.
    """
    heads = q[0].shape[2] // BLOCK
    columns = lambda x: tuple(part.swapaxes(-1, -2) for part in x)
    k_columns = columns(k)

    def see(q, dout, lse, delta, k, v, k_columns, bias=None):
        s = _dot(k, q, 2, 2)
        if options.soft_cap is not None:
            u = jnp.tanh(s / options.soft_cap)
            s = options.soft_cap * u
        if bias is not None:
            s = s + bias
        p = jnp.exp(s - lse)
        ds = p * (_dot(v, dout, 2, 2) - delta)
        if options.soft_cap is not None:
            ds = ds * (1.0 - u * u)
        return _dot(k_columns, ds, 2, 1), _dot(ds, q, 2, 1), _dot(p, dout, 2, 1)

    def block(grads, x):
        i, q, dout, lse, delta = x
        query = (tuple(part * options.scale for part in q), dout, columns(lse), columns(delta))
        dk, dv, dprefix = grads

        def tile(grads, j, edge):
            biases = _biases(tiling, runs, i, j, edge_bias if edge else (), heads, transposed=True)
            parts = map(see, *query, _at(k, j), _at(v, j), _at(k_columns, j), biases)
            dq, dk, dv = grads
            a, b, c = zip(*parts, strict=True)
            return _add(dq, a), _add_at(dk, j, b), _add_at(dv, j, c)

        if prefix is None:
            dq = tuple(jnp.zeros_like(part) for part in columns(q))
        else:
            dq, *parts = zip(*map(see, *query, *prefix, columns(prefix[0])), strict=True)
            dprefix = _add(dprefix, tuple(parts))
        dq, dk, dv = _over_keys(options, tiling, i, tile, (dq, dk, dv))
        return (dk, dv, dprefix), tuple(part * options.scale for part in dq)

    init = jax.tree.map(jnp.zeros_like, (k, v, prefix))
    blocks = (jnp.arange(tiling.q_blocks), q, dout, lse, delta)
    (dk, dv, dprefix), dq = lax.scan(block, init, blocks)
    return columns(dq), dk, dv, dprefix


def _over_keys(options, tiling, i, tile, state):
    """`state` after all tiles of query block `i`; `tile(state, j, edge)` takes one.

    The last one is the edge: the diagonal of a causal mask, or the block with padded keys.
    """
    last = i if options.causal else tiling.k_blocks - 1
    state = lax.fori_loop(0, last, lambda j, state: tile(state, j, False), state)
    return tile(state, last, True)


def _biases(tiling, runs, i, j, edge_bias, heads, *, transposed=False):
    """For each chain what to add to its scores in tile (i, j): 0 where visible, -inf elsewhere.

    Args:
      runs: tuple, over chains or of one entry for all, of int32
        `[k_blocks, pairs or 1, R, 2, BLOCK]`; or None.
      edge_bias: from `_edge_bias` for the last tile of the row, else ().
      heads: G, for which the mask is repeated.
      transposed: for scores `[keys, queries]`.

    Returns:
      tuple over chains of float32 `[pairs or 1, heads * BLOCK, BLOCK]`, or of None: all is visible.
    """
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    t = i * BLOCK + place[:, None]

    def of_runs(runs):
        runs = _at(runs, j)
        full = jnp.all(runs[:, :1, 0] <= t[0]) & jnp.all(runs[:, :1, 1] > t[-1])
        # The branch is also what keeps XLA from fusing the mask into the softmax, where it would
        # be computed for every pair, and slower than the softmax itself.
        below = edge_bias[0] if edge_bias else 0.0
        bias = lambda: _bias(masks.in_runs(runs, t), heads, transposed)
        return lax.cond(full, lambda: jnp.zeros_like(bias()) + below, lambda: bias() + below)

    biases = edge_bias if runs is None else tuple(map(of_runs, runs))
    return (biases or (None,)) * (tiling.chains // len(biases or (None,)))


def _edge_bias(options, tiling, runs, heads, *, transposed=False):
    """The part of `_biases` that only the last tile of a row has, known when tracing.

    Made outside of all loops, since XLA would fuse it into what uses it inside.
    """
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    if options.causal:
        return (_bias((place <= place[:, None])[None], heads, transposed),)
    if runs is None and tiling.last_keys < BLOCK:
        visible = jnp.broadcast_to(place < tiling.last_keys, (1, BLOCK, BLOCK))
        return (_bias(visible, heads, transposed),)
    return ()


def _bias(visible, heads, transposed):
    """Bool `[pairs or 1, BLOCK queries, BLOCK keys]` as what is added to the scores."""
    bias = jnp.where(visible, 0.0, -jnp.inf)
    if transposed:
        return jnp.tile(bias.swapaxes(1, 2), (1, 1, heads))
    return jnp.tile(bias, (1, heads, 1))


def _by_rows(tiling, x, q):
    """`[N, ...]` as `[N / rows, rows, ...]`, a step of the outer loop each; axis N may be 1."""
    if x is None:
        return None
    steps = q.shape[0] // tiling.rows
    if x.shape[0] == 1 < q.shape[0]:
        return jnp.broadcast_to(x, (steps, *x.shape))
    return x.reshape(steps, tiling.rows, *x.shape[1:])


def _to_blocks(tiling, x):
    """`[rows, P, T, K, (G,) h]`, for each chain as float32 `[chunks, blocks, pairs, G * BLOCK, h]`.

    Float32 whatever the type of x, since CPUs are slower at products of narrower types.
    """
    x = x.astype(jnp.float32)
    if x.ndim == 5:
        x = x[:, :, :, :, None]
    T, G, h = x.shape[2], *x.shape[4:]
    blocks = -(-T // BLOCK)
    x = jnp.pad(x, [(0, blocks * BLOCK - T) if axis == 2 else (0, 0) for axis in range(6)])
    x = x.reshape(*x.shape[:2], blocks, BLOCK, *x.shape[3:])
    x = x.transpose(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(tiling.chunks, tiling.chains, tiling.pairs, blocks, G * BLOCK, h)
    return tuple(x[:, c].swapaxes(1, 2) for c in range(tiling.chains))


def _from_blocks(chains, shape, dtype):
    """The inverse of `_to_blocks`."""
    rows, P, T, K, *_, h = shape
    x = jnp.stack([x.swapaxes(1, 2) for x in chains], 1)
    blocks = x.shape[3]
    x = x.reshape(rows, P, K, blocks, -1, BLOCK, h)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(rows, P, blocks * BLOCK, *shape[3:])
    return x[:, :, :T].astype(dtype)


def _mask_blocks(tiling, intervals, k_shape):
    """`[rows or 1, P or 1, R, 2, S]` as what `_biases` takes, with a leading axis of chunks."""
    if intervals is None:
        return None
    rows, P, S, K, _ = k_shape
    *axes, R, two, _ = intervals.shape
    padding = tiling.k_blocks * BLOCK - S
    x = jnp.pad(intervals, [(0, 0)] * 4 + [(0, padding)])
    x = x.reshape(*axes, 1, R, two, tiling.k_blocks, BLOCK)
    x = jnp.moveaxis(x, -2, 2)
    if axes == [1, 1]:
        return (jnp.broadcast_to(x[0], (tiling.chunks, *x.shape[2:])),)
    x = jnp.broadcast_to(x, (rows, P, *x.shape[2:]))
    x = jnp.repeat(x, K, 3)
    # A chain's pairs are of one row, and share its mask unless streams have their own.
    x = jnp.moveaxis(x, 2, 1).reshape(rows, tiling.k_blocks, P * K, R, two, BLOCK)
    x = jnp.moveaxis(x, 1, 2).reshape(
        tiling.chunks, tiling.chains, tiling.pairs, *x.shape[1:2], R, two, BLOCK
    )
    x = jnp.moveaxis(x, 3, 2)
    x = x[:, :, :, :1] if axes[1] == 1 else x
    return tuple(x[:, c] for c in range(tiling.chains))


def _prefix_chains(tiling, prefix):
    """`[P, K, M, h]`, for each chain as float32 `[chunks, pairs, M, h]`."""
    if prefix is None:
        return None
    axes = (tiling.chunks, tiling.chains, tiling.pairs)
    prefix = [x.reshape(*axes, *x.shape[2:]).astype(jnp.float32) for x in prefix]
    return tuple(tuple(x[:, c] for c in range(tiling.chains)) for x in prefix)


def _at(x, j):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, 0, keepdims=False), x)


def _add(x, y):
    return jax.tree.map(jnp.add, x, y)


def _add_at(x, j, y):
    at_j = _add(_at(x, j), y)
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, j, 0), x, at_j)


def _dot(a, b, axis_a, axis_b):
    """Float32 products over one axis of each, for each entry of axis 0."""
    dims = (((axis_a,), (axis_b,)), ((0,), (0,)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


tiled.defvjp(_forward, _backward)
