"""How the TPU kernels of attention see their arrays: cut into tiles that are whole in memory.

A tile of queries is `block_q` positions of all G heads that share a key/value head, so that one
tile of keys serves them all: its row r is position r % block_q of head r // block_q.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.masks import Mask
from pallas_kernels.masks.blocks import EMPTY, FULL, PARTIAL, block_kinds

LANES = 128


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


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def _pad(x, axis, length, value=0):
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)
