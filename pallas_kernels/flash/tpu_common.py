"""What the TPU kernels of attention share: which tiles they visit, scores and their mask.

Exponentials are powers of two, which the hardware has: scores are kept in units of ln 2.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.flash.options import Options
from pallas_kernels.flash.tpu_layout import LANES, Layout
from pallas_kernels.masks.blocks import FULL, PARTIAL, decode, tile_list

LIST_LIMIT = 3 * 2**18  # bytes, of the 1 MiB of scalar memory
VMEM_LIMIT = 15 * 2**20  # bytes; the least of any target is 16 MiB
LOG2_E = math.log2(math.e)
# Below every score, and finite: the difference to a masked score, -inf, is then no NaN.
LOWEST = -1e30


class Visit(NamedTuple):
    """A tile: its blocks, whether it begins or ends the work on one result, its kind."""

    q_block: Array
    k_block: Array
    is_first: Array
    is_last: Array
    kind: Array


class Visits(NamedTuple):
    """The tiles that a grid axis visits.

    Attributes:
      codes: int32 `[masks * length]`, of a `TileList` for each mask, one after the other.
      count: steps of the grid axis.
      length: codes of a mask.
      columns: blocks in a row of the list.
      by_keys: its rows are blocks of keys, its columns blocks of queries.
    """

    codes: Int[Array, " n"]
    count: int | Int[Array, ""]
    length: int
    columns: int
    by_keys: bool

    @property
    def operands(self) -> tuple[Array, ...]:
        """What the kernel is to have in scalar memory before it starts."""
        return (self.codes,)

    def visit(self, layout: Layout, operands, b: Array, step: Array) -> Visit:
        """Entry `step` for sequence b, from references to the operands."""
        tile = decode(operands[0][layout.mask_row(b) * self.length + step], self.columns)
        blocks = (tile.column, tile.row) if self.by_keys else (tile.row, tile.column)
        return Visit(*blocks, tile.is_first, tile.is_last, tile.kind)


def visits(kinds: Int[Array, "*lead I J"], *, by_keys: bool = False) -> Visits:
    """All tiles that are not EMPTY, those of one block of queries (or keys) after each other.

    Raises:
      ValueError: the lists do not fit in scalar memory.
    """
    listed = kinds.swapaxes(-1, -2) if by_keys else kinds
    codes, count = tile_list(listed)
    if isinstance(count, int):
        codes = codes[..., :count]
    if 4 * codes.size > LIST_LIMIT:
        raise ValueError(
            f"mask: {math.prod(codes.shape[:-1])} lists of {codes.shape[-1]} tiles, expected at "
            f"most {LIST_LIMIT // 4} tiles in all; have fewer rows with masks of their own in one "
            "call, or shorter ones"
        )
    flat = jnp.asarray(codes).reshape(-1)
    return Visits(flat, count, codes.shape[-1], listed.shape[-1], by_keys)


class Specs(NamedTuple):
    """The blocks of each kind of array that a step of the grid (sequences, K, visits) is given."""

    queries: pl.BlockSpec
    rows: pl.BlockSpec
    keys: pl.BlockSpec
    runs: pl.BlockSpec | None
    prefix: pl.BlockSpec | None


def specs(layout: Layout, visits: Visits) -> Specs:
    L = layout

    def visit(b, step, operands):
        return visits.visit(L, operands, b, step)

    queries = pl.BlockSpec(
        (None, None, L.rows, L.h),
        lambda b, head, step, *operands: (b, head, visit(b, step, operands).q_block, 0),
    )
    rows = pl.BlockSpec(
        (None, None, None, 1, L.rows),
        lambda b, head, step, *operands: (b, head, visit(b, step, operands).q_block, 0, 0),
    )
    keys = pl.BlockSpec(
        (None, None, L.block_k, L.h),
        lambda b, head, step, *operands: (b, head, visit(b, step, operands).k_block, 0),
    )
    runs = pl.BlockSpec(
        (None, L.block_k, 2 * L.R) if visits.by_keys else (None, 2 * L.R, L.block_k),
        lambda b, head, step, *operands: (
            (L.mask_row(b), visit(b, step, operands).k_block, 0)
            if visits.by_keys
            else (L.mask_row(b), 0, visit(b, step, operands).k_block)
        ),
    )
    prefix = pl.BlockSpec(
        (None, None, L.slots, L.h), lambda b, head, step, *operands: (L.stream(b), head, 0, 0)
    )
    return Specs(queries, rows, keys, runs if L.R else None, prefix if L.M else None)


def compiler_params() -> pltpu.CompilerParams:
    """For a grid whose last axis alone carries something from step to step."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


def product(a: Array, b: Array, axes: tuple[int, int]) -> Float[Array, "m n"]:
    """Contracts these axes of two matrices; float32 sums of products of full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def cap(options: Options, s: Array) -> tuple[Array, Array | None]:
    """Scaled and capped scores in units of ln 2; the tanh of the cap, None without one."""
    if options.soft_cap is None:
        return s * (options.scale * LOG2_E), None
    tanh = jnp.tanh(s * (options.scale / options.soft_cap))
    return tanh * (options.soft_cap * LOG2_E), tanh


def by_kind(layout: Layout, visit: Visit, runs, query_axis: int, take):
    """Calls `take` for a FULL tile with None, for a PARTIAL one with who sees whom, else not.

    Args:
      runs, query_axis: as for `visible`.
      take: its argument is None or a function of a slice of the tile's keys.
    """

    def when(kind):
        # Without a condition if there are no other kinds.
        return pl.when(True if layout.kinds == {kind} else visit.kind == kind)

    if FULL in layout.kinds:
        when(FULL)(lambda: take(None))
    if PARTIAL in layout.kinds:
        when(PARTIAL)(lambda: take(lambda keys: visible(layout, visit, runs, keys, query_axis)))


def visible(
    layout: Layout, visit: Visit, runs: Int[Array, "..."] | None, keys: slice, query_axis: int
) -> Bool[Array, "..."]:
    """Who sees whom in a tile.

    Args:
      runs: reference to the ends of the runs of each key, along the axis of queries; None without
        intervals.
      keys: of the tile's keys.
      query_axis: 0 for [rows, keys], 1 for [keys, rows].
    """
    sizes = (layout.rows, keys.stop - keys.start)
    shape = sizes if query_axis == 0 else sizes[::-1]
    row = lax.broadcasted_iota(jnp.int32, shape, query_axis)
    if layout.G > 1:
        row = lax.rem(row, layout.block_q)
    t = visit.q_block * layout.block_q + row
    first = visit.k_block * layout.block_k + keys.start
    s = first + lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)
    parts = []
    if layout.R:
        ends = runs[:, keys] if query_axis == 0 else runs[keys, :]
        start, end = (
            [
                lax.slice_in_dim(ends, n, n + 1, axis=query_axis)
                for n in range(side, 2 * layout.R, 2)
            ]
            for side in (0, 1)
        )
        held = [(a <= t) & (t < b) for a, b in zip(start, end, strict=True)]
        parts.append(functools.reduce(operator.or_, held))
    elif layout.S % layout.block_k:
        parts.append(s < layout.S)
    if layout.causal:
        parts.append(s <= t)
    if layout.dilation > 1:
        parts.append(lax.rem(t - s, layout.dilation) == 0)
    return functools.reduce(operator.and_, parts)


def is_slot(layout: Layout, slots: slice) -> Bool[Array, "rows slots"]:
    """Which of these slots are of the prefix, not of its padding."""
    shape = (layout.rows, slots.stop - slots.start)
    return slots.start + lax.broadcasted_iota(jnp.int32, shape, 1) < layout.M


def chunks(length: int, size: int) -> list[slice]:
    return [slice(n, min(n + size, length)) for n in range(0, length, size)]


def spread(x: Float[Array, "rows 128"], lanes: int) -> Float[Array, "rows lanes"]:
    """A number for each row, equal in all lanes, with another number of lanes."""
    return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]
