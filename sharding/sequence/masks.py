"""A mask as some consecutive queries and keys of a longer sequence see it."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Mask


def part(
    mask: Mask,
    queries: int,
    first_query: Int[Array, ""] | int,
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    first_key: Int[Array, ""] | int,
    *,
    diagonal: bool = False,
) -> tuple[Mask, Array, Array]:
    """The mask of a part of the queries and keys, and these keys and values as it counts them.

    Args:
      mask: of the whole sequence.
      queries: how many there are in the part.
      first_query: place of the first in the whole sequence; a multiple of `queries`.
      k, v: keys and values of the part.
      first_key: place of the first in the whole sequence; a multiple of `queries`.
      diagonal: the part's keys are at the places of its queries; a causal mask then stays causal,
        while elsewhere its intervals say what it lets through.
    """
    keys = k.shape[-3]
    intervals = mask.intervals
    if intervals is not None:
        if intervals.shape[-1] != keys:
            intervals = jax.lax.dynamic_slice_in_dim(intervals, first_key, keys, -1)
        intervals = jnp.clip(intervals - first_query, 0, queries)
    is_causal = mask.causal and not diagonal
    if is_causal or (intervals is None and mask.dilation > 1):
        first = jnp.zeros(keys, jnp.int32)
        if is_causal:
            first = jnp.clip(first_key + jnp.arange(keys) - first_query, 0, queries)
        if intervals is None:
            intervals = jnp.stack([first, jnp.full_like(first, queries)])[None]
        start = jnp.maximum(intervals[..., 0, :], first)
        intervals = jnp.stack([start, intervals[..., 1, :]], -2)
    if not diagonal and queries % mask.dilation:
        # An op counts queries and keys of its own from 0; so the keys move by what the two first
        # places differ modulo the dilation. The slots this takes are seen by nobody.
        shift = (first_key - first_query) % mask.dilation
        intervals, k, v = (
            _shift(x, shift, mask.dilation - 1, axis)
            for x, axis in ((intervals, -1), (k, k.ndim - 3), (v, v.ndim - 3))
        )
    return dataclasses.replace(mask, intervals=intervals, causal=mask.causal and diagonal,
                               queries=None), k, v  # fmt: skip


def _shift(x, shift, most, axis):
    """`x` longer by `most` zeros on an axis, of which `shift` stand before it."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, most)
    return jnp.roll(jnp.pad(x, padding), shift, axis)
