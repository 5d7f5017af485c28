"""Who may see whom: for each key, the runs of queries that see it."""

import dataclasses
import functools
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Visibility of keys to queries, in memory linear in their number.

    Key s is visible to query t if one of the R runs `[start, end)` of key s holds t and, where
    `causal`, s <= t. A run with start >= end is empty.

    The leading axes of `intervals` are matched with those of the queries from the left, and
    absent or size-1 axes are broadcast: with queries `[B, P, T, H, h]`, `[B, R, 2, S]` is a mask
    per batch row that all streams share, and `[R, 2, S]` is one mask for all.

    Attributes:
      intervals: int32 `[..., R, 2, S]`, start and end of each run; None: no restriction.
      causal: static; meant for as many keys as queries. Tiles above the diagonal are then not
        computed at all, so state it also where the intervals imply it.
    """

    intervals: Int[Array, "*lead R 2 S"] | None = None
    causal: bool = dataclasses.field(default=False, metadata={"static": True})


def full() -> Mask:
    """Every query sees every key."""
    return Mask()


def causal() -> Mask:
    """Query t sees the keys 0 ... t."""
    return Mask(causal=True)


def packed(segment_ids: Int[Array, "*lead T"]) -> Mask:
    """Causal within each document of a row.

    Args:
      segment_ids: a document is a run of equal ids; id 0 is padding, which sees nothing and is
        seen by nobody.
    """
    ids = jnp.asarray(segment_ids)
    length = ids.shape[-1]
    place = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    is_last = jnp.concatenate(
        [ids[..., 1:] != ids[..., :-1], jnp.ones((*ids.shape[:-1], 1), bool)], -1
    )
    last = jnp.where(is_last, place, length)
    end = jax.lax.cummin(last, axis=last.ndim - 1, reverse=True) + 1
    end = jnp.where(ids > 0, end, 0)
    return Mask(jnp.stack([place, end], -2)[..., None, :, :], causal=True)


def cached(positions: Int[Array, "B T"], length: int) -> Mask:
    """For queries that read a key/value cache whose slot s holds the key of position s.

    Args:
      positions: absolute positions of the queries, consecutive within a row.
      length: slots of the cache [S].
    """
    queries = positions.shape[-1]
    slot = jnp.arange(length, dtype=jnp.int32)
    start = jnp.maximum(slot - positions[..., :1].astype(jnp.int32), 0)
    return Mask(jnp.stack([start, jnp.full_like(start, queries)], -2)[..., None, :, :])


def dense(mask: Mask, queries: int, keys: int) -> Bool[Array, "*lead T S"]:
    """The mask as an array: whether query t sees key s. For oracles and tests.

    Args:
      mask: the mask; its leading axes are those of the result.
      queries, keys: T and S.
    """
    t = jnp.arange(queries, dtype=jnp.int32)[:, None]
    visible = jnp.ones((queries, keys), bool)
    if mask.intervals is not None:
        visible = in_runs(mask.intervals, t)
    if mask.causal:
        visible = visible & (jnp.arange(keys, dtype=jnp.int32) <= t)
    return visible


def in_runs(intervals: Int[Array, "*lead R 2 S"], t: Int[Array, "T 1"]) -> Bool[Array, "*lead T S"]:
    """Whether one of the runs of each key holds query `t`."""
    start, end = intervals[..., 0, None, :], intervals[..., 1, None, :]
    held = (start <= t) & (t < end)
    return functools.reduce(operator.or_, (held[..., r, :, :] for r in range(held.shape[-3])))
