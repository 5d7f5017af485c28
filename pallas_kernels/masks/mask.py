"""Who may see whom: for each key, the runs of queries that see it.

A mask takes memory linear in the number of keys, and all of it but two small numbers is data: it
may differ for each row of a batch and change without a new compilation. Masks combine: `a & b` is
what both let through, `a | b` what one of them does.
"""

import dataclasses
import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of keys to queries.

    Key s is visible to query t if one of the R runs `[start, end)` of key s holds t, and s <= t
    where `causal`, and t - s is a multiple of `dilation`. A run with start >= end is empty.

    The leading axes of `intervals` are matched with those of the queries from the left, and
    absent or size-1 axes are broadcast: with queries `[B, P, T, H, h]`, `[B, R, 2, S]` is a mask
    per batch row that all streams share, and `[R, 2, S]` is one mask for all.

    Attributes:
      intervals: int32 `[..., R, 2, S]`, start and end of each run; None: no restriction.
      causal: static; meant for as many keys as queries. Tiles above the diagonal are then not
        computed at all, so state it also where the intervals imply it.
      dilation: static, at least 1.
      queries: static; T, where the mask was made for one length; None: any.
    """

    intervals: Int[Array, "*lead R 2 S"] | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})
    dilation: int = dataclasses.field(default=1, metadata={"static": True})
    queries: int | None = dataclasses.field(default=None, metadata={"static": True})

    def __and__(self, other: "Mask") -> "Mask":
        """What both let through; the runs of the result are all pairs of theirs.

        Raises:
          ValueError: masks made for different lengths.
        """
        queries = _same_length(self, other)
        intervals = self.intervals if other.intervals is None else other.intervals
        if self.intervals is not None and other.intervals is not None:
            a, b = _same_axes(self.intervals, other.intervals)
            a, b = a[..., :, None, :, :], b[..., None, :, :, :]
            start = jnp.maximum(a[..., 0, :], b[..., 0, :])
            end = jnp.minimum(a[..., 1, :], b[..., 1, :])
            intervals = jnp.stack([start, end], -2)
            intervals = intervals.reshape(*intervals.shape[:-4], -1, *intervals.shape[-2:])
        dilation = math.lcm(self.dilation, other.dilation)
        return Mask(intervals, self.causal or other.causal, dilation, queries)

    def __or__(self, other: "Mask") -> "Mask":
        """What one of them lets through; the runs of the result are those of both.

        Raises:
          ValueError: masks made for different lengths, or of different dilations; or one without
            intervals has to be written as some, and neither was made for a length.
        """
        queries = _same_length(self, other)
        if self.dilation != other.dilation:
            raise ValueError(
                f"masks of dilations {self.dilation} and {other.dilation} have no union that is "
                "a mask: expected equal dilations"
            )
        causal = self.causal and other.causal
        free = [m for m in (self, other) if m.intervals is None and m.causal == causal]
        if free:
            return dataclasses.replace(free[0], queries=queries)
        if queries is None and (self.intervals is None or other.intervals is None):
            raise ValueError("a union of masks of unknown length: make one of them with a length")
        a, b = (_explicit(m, queries, causal) for m in (self, other))
        a, b = _same_axes(a, b)
        axes = jnp.broadcast_shapes(a.shape[:-3], b.shape[:-3])
        parts = [jnp.broadcast_to(x, (*axes, *x.shape[-3:])) for x in (a, b)]
        return Mask(jnp.concatenate(parts, -3), causal, self.dilation, queries)


def _same_length(a: Mask, b: Mask) -> int | None:
    lengths = {m.queries for m in (a, b)} - {None}
    keys = {m.intervals.shape[-1] for m in (a, b) if m.intervals is not None}
    if len(lengths) > 1 or len(keys) > 1:
        raise ValueError(
            f"masks made for {sorted(lengths)} queries and {sorted(keys)} keys: expected one length"
        )
    return next(iter(lengths), None)


def _same_axes(a: Array, b: Array) -> tuple[Array, Array]:
    """Both with as many leading axes, which are matched from the left."""
    rank = max(a.ndim, b.ndim)
    aligned = tuple(x.reshape(*x.shape[:-3], *[1] * (rank - x.ndim), *x.shape[-3:]) for x in (a, b))
    pairs = zip(*(x.shape[:-3] for x in aligned), strict=True)
    if any(n != m and 1 not in (n, m) for n, m in pairs):
        raise ValueError(
            f"masks with leading axes {a.shape[:-3]} and {b.shape[:-3]}: expected equal ones, from "
            "the left, or 1"
        )
    return aligned


def _explicit(mask: Mask, queries: int, keep_causal: bool) -> Array:
    """Intervals that say alone what the mask says, but for `causal` where that is kept."""
    s = jnp.arange(queries if mask.intervals is None else mask.intervals.shape[-1])
    intervals = mask.intervals
    if intervals is None:
        intervals = one_run(jnp.zeros_like(s), queries)
    if mask.causal and not keep_causal:
        start = jnp.maximum(intervals[..., 0, :], s)
        intervals = jnp.stack([start, intervals[..., 1, :]], -2)
    return intervals.astype(jnp.int32)


def one_run(start: Array, end: Array | int) -> Int[Array, "*lead 1 2 S"]:
    start, end = jnp.broadcast_arrays(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))
    return jnp.stack([start, end], -2)[..., None, :, :]


def full() -> Mask:
    """Every query sees every key."""
    return Mask()


def causal() -> Mask:
    """Query t sees the keys 0 ... t."""
    return Mask(causal=True)


def dense(mask: Mask, queries: int, keys: int, first: int = 0) -> Bool[Array, "*lead T S"]:
    """The mask as an array: whether query t sees key s. For oracles and tests.

    Args:
      mask: the mask; its leading axes are those of the result.
      queries, keys: T and S.
      first: the first of the T queries.
    """
    t = first + jnp.arange(queries, dtype=jnp.int32)[:, None]
    s = jnp.arange(keys, dtype=jnp.int32)
    visible = jnp.ones((queries, keys), bool)
    if mask.intervals is not None:
        visible = in_runs(mask.intervals, t)
    if mask.causal:
        visible = visible & (s <= t)
    if mask.dilation > 1:
        visible = visible & ((t - s) % mask.dilation == 0)
    return visible


def in_runs(intervals: Int[Array, "*lead R 2 S"], t: Int[Array, "T 1"]) -> Bool[Array, "*lead T S"]:
    """Whether one of the runs of each key holds query `t`."""
    start, end = intervals[..., 0, None, :], intervals[..., 1, None, :]
    held = (start <= t) & (t < end)
    return functools.reduce(operator.or_, (held[..., r, :, :] for r in range(held.shape[-3])))
