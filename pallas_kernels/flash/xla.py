"""Attention in plain XLA operations: the CPU path, and that of every platform without a kernel.

Short queries (decoding) take `plain`, which holds all scores, short sequences `xla_strips`. Longer
ones go tile by tile: for each block of queries a loop over the blocks of keys that it sees, with a
running softmax, so that no more than a tile of scores exists, and it lies in cache. The backward
pass computes the tiles again.

Arrays have the axes that `pallas_kernels.flash.api` states.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import masks
from pallas_kernels.flash import xla_layout as layout
from pallas_kernels.flash import xla_strips
from pallas_kernels.flash.xla_layout import BLOCK, dot

PLAIN_BELOW = 128  # queries


def plain(options, q, k, v, mask, prefix):
    """All scores at once; arguments and results of a `forward` (`pallas_kernels.flash.api`)."""
    T, S = q.shape[2], k.shape[2]

    def scores(equation, keys):
        s = jnp.einsum(equation, q, keys, preferred_element_type=jnp.float32) * options.scale
        return _cap(options, s)

    s = scores("nptkgh,npskh->npkgts", k)
    if mask.causal or mask.dilation > 1 or mask.intervals is not None:
        visible = masks.dense(mask, T, S)
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


def forward(options, q, k, v, mask, prefix):
    """The form of `plain` in strips or tiles."""
    if xla_strips.fits(q, k, mask):
        return xla_strips.forward(options, q, k, v, mask, prefix)
    tiling = layout.tiling(q, k, mask, prefix)
    prefix_chains = layout.prefix_chains(tiling, prefix)
    lists = layout.lists(tiling, mask, q, k)
    keys = k.shape[2]
    edge = _edge_bias(mask, keys, q.shape[4])

    def step(_, x):
        q, k, v, intervals, lists = x
        chains = [layout.to_blocks(tiling, x) for x in (q, k, v)]
        runs = layout.mask_blocks(tiling, intervals, k.shape)
        out, lse = lax.map(
            lambda x: _forward_chunk(options, mask, keys, lists, edge, *x),
            (*chains, runs, prefix_chains),
        )
        lse = tuple(x[..., None] for x in lse)
        return None, (
            layout.from_blocks(out, q.shape, q.dtype),
            layout.from_blocks(lse, (*q.shape[:-1], 1), jnp.float32),
        )

    arrays = layout.by_rows(tiling, q, (q, k, v, mask.intervals))
    out, lse = lax.scan(step, None, (*arrays, lists))[1]
    return out.reshape(q.shape), lse.reshape(q.shape[:-1])


def _forward_chunk(options, mask, keys, lists, edge, q, k, v, runs, prefix):
    """Output and log-sum-exp of some chains; q, k, v, runs and results are tuples over chains."""
    pairs, rows, h = q[0].shape[1:]

    def see(state, q, k, v, bias=None):
        top, total, out = state
        s = _cap(options, dot(q, k, 2, 2))
        if bias is not None:
            s = (s.reshape(pairs, -1, BLOCK, BLOCK) + bias).reshape(s.shape)
        new_top = jnp.maximum(top, jnp.max(s, -1, initial=-jnp.inf))
        base = jnp.where(new_top > -jnp.inf, new_top, 0.0)
        p = jnp.exp(s - base[..., None])
        kept = jnp.exp(top - base)
        return (
            new_top,
            total * kept + jnp.sum(p, -1),
            out * kept[..., None] + dot(p, v, 2, 1),
        )

    def block(_, x):
        i, row, q = x
        q = [part * options.scale for part in q]

        def tile(states, j, biases):
            return tuple(map(see, states, q, _at(k, j), _at(v, j), biases))

        nothing = jnp.zeros((pairs, rows), jnp.float32)
        state = (nothing - jnp.inf, nothing, jnp.zeros((pairs, rows, h), jnp.float32))
        states = (state,) * len(q)
        if prefix is not None:
            states = tuple(map(see, states, q, *prefix))
        biases = lambda j: _biases(mask, keys, runs, edge, i, j, rows // BLOCK, len(q))
        states = _over_keys(row, tile, biases, (None,) * len(q), states)
        return None, tuple(map(finish, *zip(*states, strict=True)))

    def finish(top, total, out):
        sees = total > 0.0
        total = jnp.where(sees, total, 1.0)
        return out / total[..., None], jnp.where(sees, top + jnp.log(total), -jnp.inf)

    ends = lax.scan(block, None, (jnp.arange(q[0].shape[0]), lists, q))[1]
    return tuple(zip(*ends, strict=True))


def backward(options, q, k, v, mask, prefix, out, lse, dout, dlse):
    """Gradients of `forward`."""
    if xla_strips.fits(q, k, mask):
        return xla_strips.backward(options, q, k, v, mask, prefix, out, lse, dout, dlse)
    tiling = layout.tiling(q, k, mask, prefix)
    prefix_chains = layout.prefix_chains(tiling, prefix)
    lists = layout.lists(tiling, mask, q, k)
    keys = k.shape[2]
    edge = _edge_bias(mask, keys, q.shape[4], transposed=True)

    def step(dprefix, x):
        q, k, v, intervals, out, lse, dout, dlse, lists = x
        # The softmax's own gradient: p (dp - delta); the log-sum-exp's: p dlse.
        delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1) - dlse
        # A row that sees nothing gets probabilities exp(s - inf) = 0.
        lse = jnp.where(lse > -jnp.inf, lse, jnp.inf)
        arrays = (q, k, v, dout, lse[..., None], delta[..., None])
        chains = [layout.to_blocks(tiling, x) for x in arrays]
        runs = layout.mask_blocks(tiling, intervals, k.shape)
        dq, dk, dv, dp = lax.map(
            lambda x: _backward_chunk(options, mask, keys, lists, edge, *x),
            (*chains, runs, prefix_chains),
        )
        grads = (
            layout.from_blocks(dq, q.shape, q.dtype),
            layout.from_blocks(dk, k.shape, k.dtype),
            layout.from_blocks(dv, v.shape, v.dtype),
        )
        return _add(dprefix, dp), grads

    arrays = layout.by_rows(tiling, q, (q, k, v, mask.intervals, out, lse, dout, dlse))
    dprefix = jax.tree.map(jnp.zeros_like, prefix_chains)
    dprefix, grads = lax.scan(step, dprefix, (*arrays, lists))
    dq, dk, dv = (d.reshape(x.shape) for d, x in zip(grads, (q, k, v), strict=True))
    if prefix is not None:
        dprefix = tuple(
            jnp.stack(d, 1).reshape(x.shape).astype(x.dtype)
            for d, x in zip(dprefix, prefix, strict=True)
        )
    return dq, dk, dv, dprefix


def _backward_chunk(options, mask, keys, lists, edge, q, k, v, dout, lse, delta, runs, prefix):
    """Gradients of q, k, v and prefix; these and the arguments after `edge` are tuples over chains.

    Scores are transposed, `[keys, queries]`: then no product here transposes an operand as large
    as a tile, which costs as much as the product.
    """
    heads = q[0].shape[2] // BLOCK
    columns = lambda x: tuple(part.swapaxes(-1, -2) for part in x)
    k_columns = columns(k)

    def see(q, dout, lse, delta, k, v, k_columns, bias=None):
        s = dot(k, q, 2, 2)
        if options.soft_cap is not None:
            u = jnp.tanh(s / options.soft_cap)
            s = options.soft_cap * u
        if bias is not None:
            s = s + bias
        p = jnp.exp(s - lse)
        ds = p * (dot(v, dout, 2, 2) - delta)
        if options.soft_cap is not None:
            ds = ds * (1.0 - u * u)
        return dot(k_columns, ds, 2, 1), dot(ds, q, 2, 1), dot(p, dout, 2, 1)

    def block(grads, x):
        i, row, q, dout, lse, delta = x
        query = (tuple(part * options.scale for part in q), dout, columns(lse), columns(delta))
        dk, dv, dprefix = grads

        def tile(grads, j, biases):
            parts = map(see, *query, _at(k, j), _at(v, j), _at(k_columns, j), biases)
            dq, dk, dv = grads
            a, b, c = zip(*parts, strict=True)
            return _add(dq, a), _add_at(dk, j, b), _add_at(dv, j, c)

        if prefix is None:
            dq = tuple(jnp.zeros_like(part) for part in columns(q))
        else:
            dq, *parts = zip(*map(see, *query, *prefix, columns(prefix[0])), strict=True)
            dprefix = _add(dprefix, tuple(parts))
        biases = lambda j: _biases(mask, keys, runs, edge, i, j, heads, len(q), transposed=True)
        dq, dk, dv = _over_keys(row, tile, biases, (None,) * len(q), (dq, dk, dv))
        return (dk, dv, dprefix), tuple(part * options.scale for part in dq)

    init = jax.tree.map(jnp.zeros_like, (k, v, prefix))
    xs = (jnp.arange(q[0].shape[0]), lists, q, dout, lse, delta)
    (dk, dv, dprefix), dq = lax.scan(block, init, xs)
    return columns(dq), dk, dv, dprefix


def _over_keys(row, tile, biases, unmasked, state):
    """`state` after all blocks of keys that a block of queries sees.

    Args:
      row: of the lists of blocks.
      tile: `tile(state, j, biases)`: the state after block j of keys.
      biases: `biases(j)`: what PARTIAL blocks add to the scores.
      unmasked: that of FULL ones: None for each chain.
    """

    def full(n, state):
        return tile(state, row.columns[n], unmasked)

    def partial(n, state):
        j = row.columns[n]
        return tile(state, j, biases(j))

    state = lax.fori_loop(0, row.full, full, state)
    return lax.fori_loop(row.full, row.counts, partial, state)


def _biases(mask, keys, runs, edge, i, j, heads, chains, *, transposed=False):
    """For each chain what to add to its scores in tile (i, j): 0 where visible, -inf elsewhere.

    Args:
      keys: S, without padding.
      runs: tuple, over chains or of one entry for all, of int32
        `[k_blocks, pairs or 1, R, 2, BLOCK]`; or None.
      edge: from `_edge_bias`.
      transposed: for scores `[keys, queries]`.

    Returns:
      tuple over chains of what `_bias` gives.
    """
    if edge is not None:
        return (edge,) * chains
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    t, s = i * BLOCK + place[:, None], j * BLOCK + place

    def of_runs(runs):
        # The runs of padded keys are empty.
        visible = jnp.broadcast_to(s < keys, (1, BLOCK, BLOCK))
        if runs is not None:
            visible = masks.in_runs(_at(runs, j), t)
        if mask.causal:
            visible = visible & (s <= t)
        if mask.dilation > 1:
            visible = visible & (t % mask.dilation == s % mask.dilation)
        return _bias(visible, heads, transposed)

    parts = (None,) if runs is None else runs
    make = lambda: tuple(map(of_runs, parts))
    # The branch keeps XLA from fusing the mask into the softmax, where it would be computed for
    # every pair and head, and slower than the softmax itself.
    biases = lax.cond(i >= 0, make, lambda: jax.tree.map(jnp.zeros_like, make()))
    return biases * (chains // len(parts))


def _edge_bias(mask, keys, heads, *, transposed=False):
    """The bias of every PARTIAL tile, where they are all equal and known when tracing; or None.

    Made outside of all loops, since XLA would fuse it into what uses it inside.
    """
    if mask.intervals is not None or mask.dilation > 1:
        return None
    place = jnp.arange(BLOCK, dtype=jnp.int32)
    # Keys beyond the last are above the diagonal, which is the only PARTIAL tile of a row.
    visible = place <= place[:, None] if mask.causal else place < (keys - 1) % BLOCK + 1
    return _bias(jnp.broadcast_to(visible, (1, BLOCK, BLOCK)), heads, transposed)


def _bias(visible, heads, transposed):
    """What is added to the scores of a tile, `[pairs, G, queries, keys]` or `[pairs, keys, rows]`.

    Args:
      visible: bool `[pairs or 1, BLOCK queries, BLOCK keys]`.
      heads: G; the transposed form repeats the mask for them, which is faster than to broadcast.

    Returns:
      float32 `[pairs or 1, 1, queries, keys]`, transposed `[pairs or 1, keys, G * queries]`.
    """
    bias = jnp.where(visible, 0.0, -jnp.inf)
    return jnp.tile(bias.swapaxes(1, 2), (1, 1, heads)) if transposed else bias[:, None]


def _at(x, j):
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, j, 0, keepdims=False), x)


def _add(x, y):
    return jax.tree.map(jnp.add, x, y)


def _add_at(x, j, y):
    at_j = _add(_at(x, j), y)
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, j, 0), x, at_j)
