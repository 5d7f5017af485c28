"""What a mask leaves of each block of scores, and the lists of blocks that a kernel visits.

All of it is computed inside jit from the smallest and largest ends of the runs in a block of keys:
nothing here has more than one entry for a block of queries and keys. What depends on a mask without
intervals is computed by NumPy when tracing.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from pallas_kernels.masks.mask import Mask

EMPTY, PARTIAL, FULL = 0, 1, 2


def block_kinds(
    mask: Mask, queries: int, keys: int, block_q: int, block_k: int
) -> Int[Array, "*lead I J"]:
    """EMPTY, PARTIAL or FULL for block i of queries and block j of keys.

    The last blocks may be cut by the end of the sequence; the last block of keys is then never
    FULL, so that a kernel which looks at the mask in PARTIAL blocks alone hides the padding too.
    A block may be called PARTIAL though nothing in it is visible, where its keys have runs that
    leave a gap between them; never EMPTY though something is.

    Args:
      mask: its leading axes are those of the result.
      queries, keys: T and S.
      block_q, block_k: sizes of a block; I = ceil(T / block_q), J = ceil(S / block_k).

    Returns:
      int32, a NumPy array if the mask has no intervals.
    """
    if mask.intervals is not None and mask.intervals.shape[-1] != keys:
        raise ValueError(f"a mask of {mask.intervals.shape[-1]} keys, expected {keys}")
    if mask.queries not in (None, queries):
        raise ValueError(f"a mask of {mask.queries} queries, expected {queries}")
    if min(block_q, block_k) < 1:
        raise ValueError(f"blocks of {block_q} x {block_k}: expected at least 1")
    rows, columns = -(-queries // block_q), -(-keys // block_k)
    t0 = np.arange(rows)[:, None] * block_q
    t1 = np.minimum(t0 + block_q, queries) - 1
    s0 = np.arange(columns) * block_k
    s1 = np.minimum(s0 + block_k, keys) - 1
    live = np.ones((rows, columns), bool)
    whole = np.broadcast_to(s0 + block_k <= keys, (rows, columns))
    if mask.causal:
        live, whole = live & (s0 <= t1), whole & (s1 <= t0)
    if mask.dilation > 1:
        # The differences t - s of a block are all the integers from t0 - s1 to t1 - s0.
        live = live & ((t1 - s0) // mask.dilation * mask.dilation >= t0 - s1)
        whole = whole & (t0 == t1) & (s0 == s1)
    if mask.intervals is not None:
        runs = jnp.asarray(mask.intervals, jnp.int32)
        padding = [(0, 0)] * (runs.ndim - 1) + [(0, columns * block_k - keys)]
        runs = jnp.pad(runs, padding, mode="edge").reshape(*runs.shape[:-1], 1, columns, block_k)
        start, end = runs[..., 0, :, :, :], runs[..., 1, :, :, :]
        some = start < end
        # Ends of the union of a block's runs, in which an empty run takes no part.
        first = jnp.min(jnp.where(some, start, queries), -1)
        last = jnp.max(jnp.where(some, end, 0), -1)
        live = live & jnp.any((first <= t1) & (last > t0), -3)
        whole = whole & jnp.any((jnp.max(start, -1) <= t0) & (jnp.min(end, -1) > t1), -3)
    xp = np if mask.intervals is None else jnp
    return xp.where(live, xp.where(whole, FULL, PARTIAL), EMPTY).astype(np.int32)


class RowLists(NamedTuple):
    """For each row of blocks the columns to visit.

    Attributes:
      columns: int32 `[..., I, J]`: the FULL ones, then the PARTIAL ones, each in ascending order;
        the rest repeats the last of them.
      kinds: int32 `[..., I, J]`, of these blocks; EMPTY in the rest.
      full: int32 `[..., I]`, how many are FULL.
      counts: int32 `[..., I]`, how many are not EMPTY.
    """

    columns: Int[Array, "*lead I J"]
    kinds: Int[Array, "*lead I J"]
    full: Int[Array, "*lead I"]
    counts: Int[Array, "*lead I"]


def row_lists(kinds: Int[Array, "*lead I J"]) -> RowLists:
    """The lists for a kernel that loops over the blocks of one row; pass the transpose for columns.

    Args:
      kinds: from `block_kinds`; NumPy in, NumPy out.
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    columns = kinds.shape[-1]
    place = xp.arange(columns, dtype=np.int32)
    full = xp.sum(kinds == FULL, -1).astype(np.int32)
    counts = xp.sum(kinds != EMPTY, -1).astype(np.int32)
    order = xp.argsort((FULL - kinds) * columns + place, axis=-1).astype(np.int32)
    is_live = place < counts[..., None]
    last = xp.maximum(counts - 1, 0)[..., None]
    sorted_kinds = xp.where(is_live, xp.take_along_axis(kinds, order, -1), EMPTY)
    order = xp.where(is_live, order, xp.take_along_axis(order, last, -1))
    return RowLists(order, sorted_kinds.astype(np.int32), full, counts)


class TileList(NamedTuple):
    """All blocks to visit, row after row, for a kernel with one grid axis over them.

    A row without a live block is visited once, with kind EMPTY, so that its result is written.
    Lists of several leading entries have one length; a shorter one repeats its last block, as
    EMPTY and neither first nor last of its row.

    Attributes:
      codes: int32 `[..., I * J]`, see `decode`.
      count: int32 scalar: entries to visit, the most over the leading axes; a Python integer
        where the mask has no intervals.
    """

    codes: Int[Array, "*lead n"]
    count: int | Int[Array, ""]


def tile_list(kinds: Int[Array, "*lead I J"]) -> TileList:
    """The list of the blocks of `kinds`, by rows; pass the transpose for columns.

    Raises:
      ValueError: more blocks than a code can hold (2^27).
    """
    xp = np if isinstance(kinds, np.ndarray) else jnp
    *lead, rows, columns = kinds.shape
    blocks = rows * columns
    if blocks > 2**27:
        raise ValueError(f"{rows} x {columns} blocks: expected at most 2^27; take larger ones")
    live = kinds != EMPTY
    lonely = ~xp.any(live, -1, keepdims=True) & (np.arange(columns) == 0)
    visited = (live | lonely).reshape(*lead, blocks)
    place = xp.arange(blocks, dtype=np.int32)
    flat = xp.sort(xp.where(visited, place, blocks), axis=-1)
    each = xp.sum(visited, -1, keepdims=True).astype(np.int32)
    is_real = place < each
    # The last real entry is the largest one below `blocks`.
    flat = xp.where(is_real, flat, xp.max(xp.where(visited, place, 0), -1, keepdims=True))
    row = flat // columns
    ones = xp.ones((*lead, 1), bool)
    changes = row[..., 1:] != row[..., :-1]
    first = xp.concatenate([ones, changes], -1) & is_real
    last = (xp.concatenate([changes, ones], -1) | (place == each - 1)) & is_real
    kind = xp.take_along_axis(kinds.reshape(*lead, blocks), flat, -1)
    kind = xp.where(is_real, kind, EMPTY)
    codes = (flat << 4) | (last << 3) | (first << 2) | kind
    count = xp.max(each)
    return TileList(codes.astype(np.int32), int(count) if xp is np else count)


class Tile(NamedTuple):
    """An entry of a `TileList`: its block, whether it begins or ends its row, its kind."""

    row: Array
    column: Array
    is_first: Array
    is_last: Array
    kind: Array


def decode(code: Int[Array, ""], columns: int) -> Tile:
    """What a code of a `TileList` says; `columns`: J of its `kinds`."""
    flat = code >> 4
    # Not `//`: its rounding of negative numbers asks jax for the default device, which need not be
    # the one that a kernel is compiled for.
    row = lax.div(flat, jnp.int32(columns))
    return Tile(row, flat - row * columns, (code & 4) != 0, (code & 8) != 0, code & 3)


def live_fraction(mask: Mask, queries: int, keys: int, block: int = 128) -> float:
    """Share of the blocks of scores that a kernel visits, over all leading axes of the mask."""
    return float(np.mean(np.asarray(block_kinds(mask, queries, keys, block, block)) != EMPTY))
