"""Attention by tiles, with its own backward pass: the XLA form for long sequences.

The query heads of one key/value head are folded into rows (t, g), so that a block of queries is one
contiguous slice and every product has the sequence's (stream, key/value head) pairs as its batch.
One entry of the batch is worked on at a time: its tiles stay in a CPU's cache, and the prefix needs
no broadcast. Blocks of queries see keys up to their own end where the mask is causal. The backward
pass computes the scores again, transposed, so that no tile is ever transposed.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 128
"""Queries of a tile."""
MOST_PANELS = 16
"""Most groups of query blocks that are unrolled, each with its own number of keys."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def tiled(q, k, v, intervals, prefix, causal, scale, soft_cap):
    """All of attention, memory linear in T and S.

    Args:
      q: `[N, P, T, K, G, h]`.
      k, v: `[N, P, S, K, h]`.
      intervals: int32 `[N or 1, P or 1, R, 2, S]`, or None.
      prefix: pair of `[P, K, M, h]`, or None.
      causal: whether key s is hidden from the queries before s.
      scale, soft_cap: as for `attention`.

    Returns:
      output as q and float32 log-sum-exp `[N, P, T, K, G]`.
    """
    return _forward(q, k, v, intervals, prefix, causal, scale, soft_cap)[0]


def _forward(q, k, v, intervals, prefix, causal, scale, soft_cap):
    N, P, T, K, G, _ = q.shape
    tile = _Tile(q.shape, k.shape[2], causal, scale, soft_cap)
    prefix_pairs = _prefix_pairs(prefix)

    def one(row):
        q, k, v, runs = row
        out, lse = tile.forward(
            tile.fold_queries(q), _fold_keys(k), _fold_keys(v), runs, prefix_pairs
        )
        return tile.unfold(out).astype(q.dtype), lse

    out, lse = lax.map(one, (q, k, v, _rows(intervals, N)))
    heads_last = lse.reshape(N, P, K, -1, G)[:, :, :, :T].transpose(0, 1, 3, 2, 4)
    return (out, heads_last), (q, k, v, intervals, prefix, out, lse)


def _backward(causal, scale, soft_cap, saved, cotangents):
    q, k, v, intervals, prefix, out, lse = saved
    d_out, d_lse = cotangents
    tile = _Tile(q.shape, k.shape[2], causal, scale, soft_cap)
    prefix_pairs = _prefix_pairs(prefix)

    def one(d_prefix, row):
        q, k, v, runs, out, lse, d_out, d_lse = row
        delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1) - d_lse
        dq, dk, dv, d_prefix_row = tile.backward(
            tile.fold_queries(q), _fold_keys(k), _fold_keys(v), runs, prefix_pairs,
            lse, tile.fold_queries(delta[..., None])[..., 0], tile.fold_queries(d_out),
        )  # fmt: skip
        unfold_keys = lambda x: x.reshape(k.shape[0], k.shape[2], *x.shape[1:]).swapaxes(1, 2)
        grads = tile.unfold(dq), unfold_keys(dk), unfold_keys(dv)
        d_prefix = jax.tree.map(jnp.add, d_prefix, d_prefix_row)
        return d_prefix, jax.tree.map(lambda g, like: g.astype(like.dtype), grads, (q, k, v))

    zero = jax.tree.map(lambda part: jnp.zeros(part.shape, jnp.float32), prefix_pairs)
    rows = (q, k, v, _rows(intervals, q.shape[0]), out, lse, d_out, d_lse)
    d_prefix, (dq, dk, dv) = lax.scan(one, zero, rows)
    if prefix is not None:
        d_prefix = jax.tree.map(
            lambda d, part: d.reshape(part.shape).astype(part.dtype), d_prefix, prefix
        )
    return dq, dk, dv, None, d_prefix


tiled.defvjp(_forward, _backward)


class _Tile:
    """Shapes and the arithmetic of one entry of the batch; P K = n pairs."""

    def __init__(self, q_shape, keys, causal, scale, soft_cap):
        _, self.P, self.T, self.K, self.G, self.h = q_shape
        self.S, self.causal, self.scale, self.soft_cap = keys, causal, scale, soft_cap
        self.blocks = -(-self.T // BLOCK)
        self.padded = self.blocks * BLOCK

    def panels(self):
        """Groups of query blocks, and how many keys each needs: (first, last + 1, keys)."""
        size = -(-self.blocks // MOST_PANELS)
        for first in range(0, self.blocks, size):
            last = min(first + size, self.blocks)
            yield first, last, min(last * BLOCK, self.S) if self.causal else self.S

    def fold_queries(self, x):
        """`[P, T, K, G, h]` as `[n, T G, h]`, T padded to whole blocks."""
        if self.padded > self.T:
            x = jnp.pad(x, ((0, 0), (0, self.padded - self.T), (0, 0), (0, 0), (0, 0)))
        return x.swapaxes(1, 2).reshape(self.P * self.K, self.padded * self.G, -1)

    def unfold(self, x):
        x = x.reshape(self.P, self.K, self.padded, self.G, -1)
        return x[:, :, : self.T].swapaxes(1, 2)

    def block(self, x, index):
        """The rows of a block of queries, `index` static or not."""
        rows = BLOCK * self.G
        if isinstance(index, int):
            return x[:, index * rows : (index + 1) * rows]
        return lax.dynamic_slice_in_dim(x, index * rows, rows, 1)

    def cap(self, s):
        return s if self.soft_cap is None else self.soft_cap * jnp.tanh(s / self.soft_cap)

    def uncap(self, ds, s):
        return ds if self.soft_cap is None else ds * (1 - jnp.square(s / self.soft_cap))

    def hide(self, s, runs, index, query_axis):
        """Scores with -inf where a key is not visible; the queries lie along `query_axis`."""
        keys = s.shape[3 - query_axis]
        t = index * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        t_tile = t[:, None] if query_axis == 1 else t[None, :]
        lie = lambda x: x[..., None, :] if query_axis == 1 else x[..., :, None]
        if runs is not None:
            runs = runs[..., :keys]
            visible = (lie(runs[:, 0, 0]) <= t_tile) & (t_tile < lie(runs[:, 0, 1]))
            for run in range(1, runs.shape[1]):
                visible |= (lie(runs[:, run, 0]) <= t_tile) & (t_tile < lie(runs[:, run, 1]))
            if self.causal:
                visible &= lie(jnp.arange(keys, dtype=jnp.int32)) <= t_tile
            visible = jnp.repeat(visible, self.G, query_axis)
            visible = visible if visible.shape[0] == 1 else jnp.repeat(visible, self.K, 0)
            return jnp.where(visible, s, -jnp.inf)
        if not self.causal:
            return s
        static = isinstance(index, int)
        clear = index * BLOCK if static else 0  # keys that all the block's queries see
        visible = lie(jnp.arange(clear, keys, dtype=jnp.int32)) <= t_tile
        bias = jnp.repeat(jnp.where(visible, 0.0, -jnp.inf), self.G, query_axis - 1)
        if query_axis == 1:
            return jnp.concatenate([s[..., :clear], s[..., clear:] + bias], -1)
        return jnp.concatenate([s[:, :clear], s[:, clear:] + bias], 1)

    def forward(self, q, k, v, runs, prefix):
        """Output `[n, T G, h]` and log-sum-exp `[n, T G]`, both float32."""
        q = q * self.scale

        def block(index, keys):
            rows = self.block(q, index)
            s = self.hide(self.cap(_dot(rows, k[:, :keys], 2, 2)), runs, index, 1)
            top = jnp.max(s, -1, keepdims=True)
            if prefix is not None:
                s_prefix = self.cap(_dot(rows, prefix[0], 2, 2))
                top = jnp.maximum(top, jnp.max(s_prefix, -1, keepdims=True))
            if runs is not None:
                top = jnp.where(top > -jnp.inf, top, 0.0)
            p = jnp.exp(s - top)
            total = jnp.sum(p, -1, keepdims=True)
            out = _dot(p.astype(v.dtype), v[:, :keys], 2, 1)
            if prefix is not None:
                p_prefix = jnp.exp(s_prefix - top)
                total += jnp.sum(p_prefix, -1, keepdims=True)
                out += _dot(p_prefix.astype(v.dtype), prefix[1], 2, 1)
            sees = total > 0
            lse = jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)
            return out / jnp.where(sees, total, 1.0), lse[..., 0]

        parts = [self.over_blocks(block, *panel) for panel in self.panels()]
        return tuple(jnp.concatenate(part, 1) for part in zip(*parts, strict=True))

    def over_blocks(self, block, first, last, keys):
        """`block` of each index of a panel, the results joined along the rows."""
        if last - first == 1:
            return block(first, keys)
        parts = lax.map(lambda index: block(index, keys), jnp.arange(first, last))
        join = lambda x: jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
        return jax.tree.map(join, parts)

    def backward(self, q, k, v, runs, prefix, lse, delta, d_out):
        """Gradients of q `[n, T G, h]`, k, v `[n, S, h]` and the prefix, float32."""
        q = q * self.scale
        # A row that sees nothing has lse -inf; any finite value keeps its probabilities at 0.
        lse = jnp.where(lse > -jnp.inf, lse, 0.0)

        def part(rows, d_rows, lse, delta, keys, values, hide):
            s = self.cap(_dot(keys, rows, 2, 2))
            p = jnp.exp(hide(s) - lse)
            dp = _dot(values, d_rows, 2, 2)
            ds = self.uncap(p * (dp - delta), s)
            low = rows.dtype
            d_values = _dot(p.astype(low), d_rows, 2, 1)
            ds = ds.astype(low)
            return _dot(keys, ds, 1, 1), _dot(ds, rows, 2, 1), d_values

        def block(index, keys):
            rows, d_rows = self.block(q, index), self.block(d_out, index)
            row_lse = self.block(lse, index)[:, None]
            row_delta = self.block(delta, index)[:, None]
            hide = lambda s: self.hide(s, runs, index, 2)
            dq, dk, dv = part(rows, d_rows, row_lse, row_delta, k[:, :keys], v[:, :keys], hide)
            d_prefix = None
            if prefix is not None:
                dq_prefix, *d_prefix = part(rows, d_rows, row_lse, row_delta, *prefix, lambda s: s)
                dq += dq_prefix
            return dq.swapaxes(1, 2) * self.scale, (dk, dv), d_prefix

        dqs, d_keys, d_prefix = [], None, None
        for first, last, keys in self.panels():
            dq, d_panel, d_panel_prefix = self.sum_blocks(block, first, last, keys)
            dqs.append(dq)
            pad = lambda x: jnp.pad(x, ((0, 0), (0, self.S - x.shape[1]), (0, 0)))
            d_panel = jax.tree.map(pad, d_panel)
            add = lambda total, new: new if total is None else jax.tree.map(jnp.add, total, new)
            d_keys, d_prefix = add(d_keys, d_panel), add(d_prefix, d_panel_prefix)
        d_prefix = None if prefix is None else tuple(d_prefix)
        return jnp.concatenate(dqs, 1), *d_keys, d_prefix

    def sum_blocks(self, block, first, last, keys):
        """dq of a panel's blocks joined, the gradients of keys, values and prefix summed."""
        if last - first == 1:
            return block(first, keys)
        shapes = jax.eval_shape(lambda: block(jnp.int32(first), keys))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1:])

        def step(total, index):
            dq, *sums = block(index, keys)
            return jax.tree.map(jnp.add, total, tuple(sums)), dq

        sums, dq = lax.scan(step, zero, jnp.arange(first, last))
        return jnp.moveaxis(dq, 0, 1).reshape(dq.shape[1], -1, dq.shape[3]), *sums


def _dot(a, b, a_axis, b_axis):
    """Batched over the pairs, contracted over the given axes, accumulated in float32."""
    dimensions = (((a_axis,), (b_axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def _fold_keys(x):
    """`[P, S, K, h]` as `[n, S, h]`."""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def _prefix_pairs(prefix):
    """`[P, K, M, h]` as `[n, M, h]`."""
    return None if prefix is None else tuple(x.reshape(-1, *x.shape[2:]) for x in prefix)


def _rows(intervals, N):
    """Intervals with one entry `[P or 1, R, 2, S]` for each of the N steps."""
    if intervals is None:
        return None
    return jnp.broadcast_to(intervals, (N, *intervals.shape[1:]))
