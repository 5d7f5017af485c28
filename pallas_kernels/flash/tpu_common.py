"""What the TPU kernels of attention share: how arrays are cut into tiles, scores and their mask.

A tile of queries is `block_q` positions of all G heads that share a key/value head, so that one
tile of keys serves them all: its row r is position r % block_q of head r // block_q. Exponentials
are powers of two, which the hardware has: scores are kept in units of ln 2.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask
from pallas_kernels.masks.blocks import FULL, PARTIAL, Tile, block_kinds, tile_list

LANES = 128
VMEM_LIMIT = 32 * 2**20
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


class Visits(NamedTuple):
    """Tiles that a grid axis visits: the codes of a `TileList`, all masks in one axis.

    Attributes:
      codes: int32 `[masks * length]`.
      count: steps of the grid axis.
      length: codes of a mask.
      columns: blocks in a row of the list, for `decode`.
    """

    codes: Int[Array, " n"]
    count: int | Int[Array, ""]
    length: int
    columns: int

    def tile(self, layout: Layout, codes, b, step) -> Tile:
        """Entry `step` for sequence b; `codes`: a reference to the codes.

        As `decode`, without `//`: its rounding for negative numbers asks for the default device.
        """
        code = codes[layout.mask_row(b) * self.length + step]
        flat = code >> 4
        row = lax.div(flat, self.columns)
        column = flat - row * self.columns
        return Tile(row, column, (code & 4) != 0, (code & 8) != 0, code & 3)


def visits(kinds: Int[Array, "*lead I J"]) -> Visits:
    """The list of the blocks of `kinds`, by rows; pass the transpose for columns."""
    codes, count = tile_list(kinds)
    return Visits(jnp.asarray(codes).reshape(-1), count, codes.shape[-1], kinds.shape[-1])


def make_layout(
    q, k, mask: Mask, prefix, block_q: int, block_k: int
) -> tuple[Layout, Int[Array, "*lead I J"]]:
    """The layout for arrays as in `pallas_kernels.flash.api`, and the kinds of the blocks."""
    (N, P, T, K, G, h), S = q.shape, k.shape[2]
    kinds = block_kinds(mask, T, S, block_q, block_k)
    present = frozenset(np.unique(kinds).tolist()) if mask.intervals is None else {PARTIAL, FULL}
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
        kinds=frozenset(present) & {PARTIAL, FULL},
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
    return _pad(x.astype(dtype), 2, round_up(layout.M, LANES))


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


def visible(
    layout: Layout, i: Array, j: Array, runs: Int[Array, "..."] | None, query_axis: int
) -> Bool[Array, "..."]:
    """Who sees whom in the tile of query block i and key block j.

    Args:
      runs: ends of the runs of each key, along the axis of queries; None without intervals.
      query_axis: 0 for a tile [rows, keys], 1 for [keys, rows].
    """
    shape = (layout.rows, layout.block_k) if query_axis == 0 else (layout.block_k, layout.rows)
    key_axis = 1 - query_axis
    row = lax.broadcasted_iota(jnp.int32, shape, query_axis)
    if layout.G > 1:
        row = lax.rem(row, layout.block_q)
    t = i * layout.block_q + row
    s = j * layout.block_k + lax.broadcasted_iota(jnp.int32, shape, key_axis)
    parts = []
    if layout.R:
        ends = [lax.slice_in_dim(runs, n, n + 1, axis=query_axis) for n in range(2 * layout.R)]
        held = [(ends[2 * r] <= t) & (t < ends[2 * r + 1]) for r in range(layout.R)]
        parts.append(jax.tree.reduce(jnp.logical_or, held))
    elif layout.S % layout.block_k:
        parts.append(s < layout.S)
    if layout.causal:
        parts.append(s <= t)
    if layout.dilation > 1:
        parts.append(lax.rem(t - s, layout.dilation) == 0)
    return jax.tree.reduce(jnp.logical_and, parts)


def spread(x: Float[Array, "rows 128"], lanes: int) -> Float[Array, "rows lanes"]:
    """A number for each row, equal in all lanes, with another number of lanes."""
    return jnp.tile(x, (1, -(-lanes // LANES)))[:, :lanes]
