"""What the TPU kernels of attention share: how arrays are cut into tiles, scores and their mask.

A tile of queries is `block_q` positions of all G heads that share a key/value head, so that one
tile of keys serves them all: its row r is position r % block_q of head r // block_q. Exponentials
are powers of two, which the hardware has: scores are kept in units of ln 2.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask
from pallas_kernels.masks.blocks import EMPTY, FULL, PARTIAL, block_kinds, tile_list

LANES = 128
LIST_LIMIT = 3 * 2**18  # bytes, of the 1 MiB of scalar memory
VMEM_LIMIT = 15 * 2**20  # bytes; the least of any target is 16 MiB
LOG2_E = math.log2(math.e)
# Below every score, and finite: the difference to a masked score, -inf, is then no NaN.
LOWEST = -1e30


class Layout(NamedTuple):
    """The sizes of a call, all known when tracing.

    Attributes:
      sequences: N * P; sequence b is entry b % P of axis P.
      P, K, G, T, S, h, M: lengths of these axes; M = 0 without a prefix.
      block_q, block_k: query positions and keys of a tile.
      causal, dilation, R: of the mask; R = 0 without intervals.
      mask_lead: leading axes of the mask, [N or 1, P or 1].
      kinds: the kinds of tiles that can occur.
    """

    sequences: int
    P: int
    K: int
    G: int
    T: int
    S: int
    h: int
    M: int
    block_q: int
    block_k: int
    causal: bool
    dilation: int
    R: int
    mask_lead: tuple[int, int]
    kinds: frozenset[int]

    @property
    def rows(self) -> int:
        """Of a tile of queries."""
        return self.G * self.block_q

    @property
    def slots(self) -> int:
        """Of the prefix, padded."""
        return round_up(self.M, LANES)

    @property
    def q_blocks(self) -> int:
        return -(-self.T // self.block_q)

    @property
    def k_blocks(self) -> int:
        return -(-self.S // self.block_k)

    def mask_row(self, b: Array) -> Array:
        """Which of the masks, laid out in one axis, is that of sequence b."""
        N, P = self.mask_lead
        return (lax.div(b, self.P) if N > 1 else 0) * P + (self.stream(b) if P > 1 else 0)

    def stream(self, b: Array) -> Array:
        return lax.rem(b, self.P)


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
        """Entry `step` for sequence b, from references to the operands.

        As `masks.blocks.decode`, without `//`: its rounding of negative numbers asks jax for the
        default device, which need not be the one compiled for.
        """
        code = operands[0][layout.mask_row(b) * self.length + step]
        flat = code >> 4
        row = lax.div(flat, self.columns)
        column = flat - row * self.columns
        q_block, k_block = (column, row) if self.by_keys else (row, column)
        return Visit(q_block, k_block, (code & 4) != 0, (code & 8) != 0, code & 3)


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


def make_layout(
    q, k, mask: Mask, prefix, block_q: int, block_k: int
) -> tuple[Layout, Int[Array, "*lead I J"]]:
    """The layout for arrays as in `pallas_kernels.flash.api`, and the kinds of the blocks."""
    (N, P, T, K, G, h), S = q.shape, k.shape[2]
    kinds = block_kinds(mask, T, S, block_q, block_k)
    present = np.unique(kinds) if mask.intervals is None else (EMPTY, PARTIAL, FULL)
    layout = Layout(
        sequences=N * P,
        P=P,
        K=K,
        G=G,
        T=T,
        S=S,
        h=h,
        M=0 if prefix is None else prefix[0].shape[2],
        block_q=block_q,
        block_k=block_k,
        causal=mask.causal,
        dilation=mask.dilation,
        R=0 if mask.intervals is None else mask.intervals.shape[-3],
        mask_lead=(1, 1) if mask.intervals is None else mask.intervals.shape[:2],
        kinds=frozenset(int(kind) for kind in present),
    )
    return layout, kinds


def fold_queries(
    layout: Layout, x: Float[Array, "N P T K G h"]
) -> Float[Array, "sequences K rows h"]:
    """Tile after tile, the last one padded with zeros."""
    blocks = layout.q_blocks
    x = _pad(x.reshape(layout.sequences, *x.shape[2:]), 1, blocks * layout.block_q)
    x = x.reshape(layout.sequences, blocks, layout.block_q, *x.shape[2:])
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(layout.sequences, layout.K, -1, x.shape[-1])


def unfold_queries(
    layout: Layout, x: Float[Array, "sequences K rows h"]
) -> Float[Array, "N P T K G h"]:
    K, G, size = layout.K, layout.G, layout.block_q
    x = x.reshape(layout.sequences, K, layout.q_blocks, G, size, -1).transpose(0, 2, 4, 1, 3, 5)
    x = x.reshape(layout.sequences, layout.q_blocks * size, K, G, -1)[:, : layout.T]
    return x.reshape(-1, layout.P, *x.shape[1:])


def fold_keys(layout: Layout, x: Float[Array, "N P S K h"]) -> Float[Array, "sequences K keys h"]:
    """Padded with zeros to whole blocks."""
    x = x.reshape(layout.sequences, *x.shape[2:]).transpose(0, 2, 1, 3)
    return _pad(x, 2, layout.k_blocks * layout.block_k)


def unfold_keys(layout: Layout, x: Float[Array, "sequences K keys h"]) -> Float[Array, "N P S K h"]:
    x = x[:, :, : layout.S].transpose(0, 2, 1, 3)
    return x.reshape(-1, layout.P, *x.shape[1:])


def fold_rows(
    layout: Layout, x: Float[Array, "N P T K G"], padding: float
) -> Float[Array, "sequences K blocks 1 rows"]:
    """One number for each query, in the order of `fold_queries`, along the lanes."""
    x = x.reshape(layout.sequences, *x.shape[2:])
    x = _pad(x, 1, layout.q_blocks * layout.block_q, padding)
    x = x.reshape(layout.sequences, layout.q_blocks, layout.block_q, layout.K, layout.G)
    x = x.transpose(0, 3, 1, 4, 2)
    return x.reshape(layout.sequences, layout.K, layout.q_blocks, 1, layout.rows)


def unfold_rows(
    layout: Layout, x: Float[Array, "sequences K blocks 1 rows"]
) -> Float[Array, "N P T K G"]:
    x = x.reshape(layout.sequences, layout.K, -1, layout.rows, 1)
    return unfold_queries(layout, x)[..., 0]


def fold_runs(layout: Layout, mask: Mask) -> Int[Array, "masks ends keys"]:
    """Start and end of run r of each key at 2r and 2r + 1; padding is seen by nobody."""
    runs = jnp.asarray(mask.intervals, jnp.int32).reshape(-1, 2 * layout.R, layout.S)
    return _pad(runs, 2, layout.k_blocks * layout.block_k)


def fold_prefix(layout: Layout, x: Float[Array, "P K M h"], dtype) -> Float[Array, "P K slots h"]:
    """Padded with zeros to a multiple of the lanes."""
    return _pad(x.astype(dtype), 2, layout.slots)


def compiler_params() -> pltpu.CompilerParams:
    """For a grid whose last axis alone carries something from step to step."""
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
    )


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pad(x, axis, length, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


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


def when_kind(layout: Layout, kind: int, visit: Visit):
    """Runs a function for tiles of one kind; without a condition if there are no others."""
    if kind not in layout.kinds:
        return lambda body: None
    return pl.when(True if layout.kinds == {kind} else visit.kind == kind)


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
