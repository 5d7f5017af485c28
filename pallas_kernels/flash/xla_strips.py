"""Attention over short sequences in plain XLA operations: a strip of scores at a time.

A strip is a block of queries against all keys, or under a causal mask those up to its last query:
what else the mask hides is computed too. Strips are unrolled, their softmax is done in one go, and
their products are large enough that XLA computes each on several cores. The backward pass computes
the scores again, transposed: then no product transposes an operand as large as a strip.

Arrays have the axes that `pallas_kernels.flash.api` states. A pair is one key/value head of one
sequence; its rows are (position, query head), its keys those of the prefix and then the others.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.flash.xla_layout import BLOCK, divisor, dot

SCORES = 2**18  # of a strip of all pairs of a step: they stay in cache
# Queries, and keys, up to which strips are faster than tiles. Intervals may leave few of the blocks
# of a long sequence, and only tiles skip the others.
LONGEST = 512
LONGEST_WITH_INTERVALS = 256


class Steps(NamedTuple):
    """How the work is cut: a step takes `rows` entries of axis N and `streams` of axis P."""

    count: int
    rows: int
    streams: int

    def split(self, x):
        """`[N, P, ...]` as `[count, rows * streams, ...]`."""
        return x.reshape(self.count, self.rows * self.streams, *x.shape[2:])


def fits(q, k, mask) -> bool:
    """Whether strips are the faster form for arrays of these shapes."""
    longest = LONGEST if mask.intervals is None else LONGEST_WITH_INTERVALS
    return max(q.shape[2], k.shape[2]) <= longest


def forward(options, q, k, v, mask, prefix):
    """Output and log-sum-exp."""
    N, P, T, K, G, _ = q.shape
    steps, slots = _steps(q, k, prefix)

    def step(_, x):
        index, runs, q0, k, v = x
        q = _pairs(q0)
        k, v = _with_prefix(steps, prefix, index, k, v)
        parts = []
        for rows, t, s in _strips(T, G, k.shape[1], slots, mask):
            scores = dot(q[:, rows] * options.scale, k[:, : s.size], 2, 2)
            if options.soft_cap is not None:
                scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
            scores = _hide(index, mask, runs, t[:, None], s[None], scores)
            top = jnp.max(scores, -1, keepdims=True)
            top = jnp.where(top > -jnp.inf, top, 0.0)
            p = jnp.exp(scores - top)
            total = jnp.sum(p, -1, keepdims=True)
            lse = jnp.where(total > 0.0, top + jnp.log(total), -jnp.inf)
            total = jnp.where(total > 0.0, total, 1.0)
            parts.append((dot(p, v[:, : s.size], 2, 1) / total, lse[..., 0]))
        out, lse = (jnp.concatenate(part, 1) for part in zip(*parts, strict=True))
        return None, (_unpaired(out, q0), lse)

    xs = (jnp.arange(steps.count), _runs(steps, q, mask, slots), *map(steps.split, (q, k, v)))
    out, lse = lax.scan(step, None, xs)[1]
    return out.reshape(q.shape), lse.reshape(N, P, K, T, G).swapaxes(2, 3)


def backward(options, q, k, v, mask, prefix, out, lse, dout, dlse):
    """Gradients of `forward`."""
    T, _, G, _ = q.shape[2:]
    steps, slots = _steps(q, k, prefix)
    # A row that sees nothing gets probabilities exp(s - inf) = 0.
    lse = jnp.where(lse > -jnp.inf, lse, jnp.inf)
    # Rows last, and outside of the loop: XLA would fuse the transposition into the strips.
    rows_last = lambda x: steps.split(x.swapaxes(2, 3)).reshape(steps.count, -1, 1, T * G)

    def step(_, x):
        index, runs, q0, k0, v0, dout, out, lse, dlse = x
        q, dout = _pairs(q0), _pairs(dout)
        k, v = _with_prefix(steps, prefix, index, k0, v0)
        # The softmax's own gradient: p (dp - delta); the log-sum-exp's: p dlse.
        delta = jnp.sum(_pairs(out) * dout, -1)[:, None] - dlse
        k_columns = lax.optimization_barrier(k.swapaxes(1, 2))
        dq, dk, dv = [], 0.0, 0.0
        for rows, t, s in _strips(T, G, k.shape[1], slots, mask):
            n = s.size
            q_rows, dout_rows = q[:, rows] * options.scale, dout[:, rows]
            scores = dot(k[:, :n], q_rows, 2, 2)
            if options.soft_cap is not None:
                u = jnp.tanh(scores / options.soft_cap)
                scores = options.soft_cap * u
            scores = scores - lse[..., rows]
            p = jnp.exp(_hide(index, mask, runs, t[None], s[:, None], scores))
            ds = p * (dot(v[:, :n], dout_rows, 2, 2) - delta[..., rows])
            if options.soft_cap is not None:
                ds = ds * (1.0 - u * u)
            columns = dot(k_columns[..., :n], ds, 2, 1) * options.scale
            # Else XLA transposes all of dq at once, out of cache.
            dq.append(lax.optimization_barrier(columns.swapaxes(1, 2)))
            below = [(0, 0), (0, k.shape[1] - n), (0, 0)]
            dk = dk + jnp.pad(dot(ds, q_rows, 2, 1), below)
            dv = dv + jnp.pad(dot(p, dout_rows, 2, 1), below)
        grads = (jnp.concatenate(dq, 1), dk[:, slots:], dv[:, slots:])
        grads = map(_unpaired, grads, (q0, k0, v0))
        return None, (*grads, dk[:, :slots], dv[:, :slots])

    arrays = (*map(steps.split, (q, k, v, dout, out)), rows_last(lse), rows_last(dlse))
    xs = (jnp.arange(steps.count), _runs(steps, q, mask, slots), *arrays)
    *grads, dprefix_k, dprefix_v = lax.scan(step, None, xs)[1]
    dprefix = None
    if prefix is not None:
        sums = [jnp.sum(x.reshape(q.shape[0], *prefix[0].shape), 0) for x in (dprefix_k, dprefix_v)]
        dprefix = tuple(d.astype(x.dtype) for d, x in zip(sums, prefix, strict=True))
    return *(d.reshape(x.shape) for d, x in zip(grads, (q, k, v), strict=True)), dprefix


def _steps(q, k, prefix) -> tuple[Steps, int]:
    """The cut of the work, and M."""
    N, P, T, K, G, _ = q.shape
    slots = 0 if prefix is None else prefix[0].shape[2]
    most = SCORES // (K * G * min(T, BLOCK) * (k.shape[2] + slots))
    streams = divisor(P, most)
    rows = divisor(N, most // P) if streams == P else 1
    return Steps(N * P // (rows * streams), rows, streams), slots


def _strips(T, G, keys, slots, mask):
    """Of each strip: its rows, their positions, and those of its keys, below 0 in the prefix."""
    for first in range(0, T, BLOCK):
        last = min(first + BLOCK, T)
        rows = slice(first * G, last * G)
        n = slots + last if mask.causal else keys
        yield rows, np.arange(rows.start, rows.stop) // G, np.arange(n) - slots


def _pairs(x):
    """`[entries, T, K, (G,) h]` as float32 `[entries * K, T * G, h]`.

    Float32 whatever the type of x, since CPUs are slower at products of narrower types.
    """
    entries, _, K, *_, h = x.shape
    return x.astype(jnp.float32).swapaxes(1, 2).reshape(entries * K, -1, h)


def _unpaired(x, like):
    """The inverse of `_pairs`, in the shape and type of `like`."""
    entries, T, K, *group, h = like.shape
    x = x.reshape(entries, K, T, *group, h).swapaxes(1, 2)
    return x.astype(like.dtype)


def _with_prefix(steps, prefix, index, *arrays):
    """Keys and values of a step as pairs, behind those of the prefix."""
    arrays = tuple(map(_pairs, arrays))
    if prefix is None:
        return arrays

    def join(slots, x):
        slots = slots.reshape(-1, steps.streams, *slots.shape[1:])
        slots = lax.dynamic_index_in_dim(slots, index % len(slots), 0)
        slots = jnp.broadcast_to(slots, (steps.rows, *slots.shape[1:]))
        return jnp.concatenate([slots.reshape(len(x), -1, x.shape[2]).astype(x.dtype), x], 1)

    return tuple(map(join, prefix, arrays))


def _runs(steps, q, mask, slots):
    """The mask's intervals for each step, with empty ones for the prefix: None if it has none."""
    if mask.intervals is None:
        return None
    runs = jnp.pad(mask.intervals, [(0, 0)] * 4 + [(slots, 0)])
    return steps.split(jnp.broadcast_to(runs, (*q.shape[:2], *runs.shape[2:])))


def _hide(index, mask, runs, t, s, scores):
    """Scores `[pairs, ...]`, -inf where the mask hides position s from t.

    Args:
      runs: of the step, `[entries, R, 2, slots + S]`, or None.
      t, s: positions, below 0 for the prefix; they broadcast to the axes of scores after the first.
    """
    if runs is None and not mask.causal and mask.dilation == 1:
        return scores

    def make():
        visible = jnp.ones((1, 1, 1), bool)
        if runs is not None:
            runs_of = lambda end: runs[:, :, end, : s.size].reshape(*runs.shape[:2], *s.shape)
            visible = jnp.any((runs_of(0) <= t) & (t < runs_of(1)), 1)
        if mask.causal:
            visible = visible & (s <= t)
        if mask.dilation > 1:
            visible = visible & ((t - s) % mask.dilation == 0)
        return visible | (s < 0)

    # The branch keeps XLA from computing the mask for every pair, inside the softmax.
    visible = make() if runs is None else lax.cond(index >= 0, make, lambda: jnp.zeros_like(make()))
    by_entry = scores.reshape(len(visible), -1, *scores.shape[1:])
    return jnp.where(visible[:, None], by_entry, -jnp.inf).reshape(scores.shape)
