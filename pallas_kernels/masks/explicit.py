"""Masks from what is not a rule: a list of blocks, or a small array of who sees whom."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int

from pallas_kernels.masks.mask import Mask

LONGEST_DENSE = 4096
MOST_RUNS = 64


def from_dense(visible: Bool[np.ndarray, "*lead T S"], *, runs: int | None = None) -> Mask:
    """The mask of an array that is known when tracing: whether query t sees key s.

    Args:
      visible: `[..., T, S]`, both at most 4096.
      runs: R, to give masks of different arrays one shape; None: as many as this one needs.

    Raises:
      ValueError: the array is traced or too long, or a key is seen in more than `runs` runs (64 by
        default).
    """
    if isinstance(visible, jax.core.Tracer):
        raise ValueError(
            "a dense mask inside jit: expected a NumPy array, or build `Mask(intervals)` from data"
        )
    visible = np.asarray(visible, bool)
    if visible.ndim < 2:
        raise ValueError(f"a dense mask {visible.shape}: expected [..., T, S]")
    *lead, queries, keys = visible.shape
    if max(queries, keys) > LONGEST_DENSE:
        raise ValueError(
            f"a dense mask of {queries} queries and {keys} keys: expected at most {LONGEST_DENSE} "
            "of each; longer ones are made of intervals, or by `from_blocks`"
        )
    columns = np.moveaxis(visible, -2, -1)
    intervals = _stacked([_runs(columns.reshape(-1, queries))], runs)
    intervals = np.moveaxis(intervals.reshape(*lead, keys, *intervals.shape[-2:]), -3, -1)
    return Mask(jnp.asarray(intervals), queries=queries)


def from_blocks(
    pairs: Sequence[tuple[int, int]] | Int[np.ndarray, "n 2"],
    length: int,
    block: int,
    *,
    patterns: Bool[np.ndarray, "kinds block block"] | None = None,
    pattern_of: Int[np.ndarray, " n"] | None = None,
    runs: int | None = None,
) -> Mask:
    """The mask of a list of blocks, such as the adjacency of a mesh; memory linear in the length.

    Args:
      pairs: (query block, key block), each pair once; blocks that are not listed are empty.
      length: T = S.
      block: positions of a block; the last one may be cut by the end.
      patterns: who sees whom within a block, by kind; None: all see all.
      pattern_of: for each pair its kind; None: the first.
      runs: R, as in `from_dense`.

    Raises:
      ValueError: a block outside the sequence, listed twice, or of a kind that is not there; a key
        seen in more than `runs` runs (64 by default).
    """
    if block < 1 or length < 1:
        raise ValueError(f"block={block}, length={length}: expected at least 1 of each")
    pairs = np.asarray(pairs, np.int64).reshape(-1, 2)
    blocks = -(-length // block)
    if pairs.size and not (pairs.min() >= 0 and pairs.max() < blocks):
        raise ValueError(
            f"block {pairs[(pairs < 0) | (pairs >= blocks)][0]}: expected 0 to {blocks - 1}, for "
            f"{length} positions in blocks of {block}"
        )
    if len(np.unique(pairs, axis=0)) < len(pairs):
        raise ValueError("a pair of blocks is listed twice: expected each once")
    table = np.ones((1, block, block), bool) if patterns is None else np.asarray(patterns, bool)
    kinds = np.zeros(len(pairs), int) if pattern_of is None else np.asarray(pattern_of)
    if table.shape[1:] != (block, block) or kinds.shape != (len(pairs),):
        raise ValueError(
            f"patterns {table.shape} and pattern_of {kinds.shape}: expected "
            f"(kinds, {block}, {block}) and ({len(pairs)},)"
        )
    if kinds.size and not (kinds.min() >= 0 and kinds.max() < len(table)):
        raise ValueError(f"pattern_of has {kinds.max()}: expected 0 to {len(table) - 1}")
    parts = []
    for key_block in range(blocks):
        mine = pairs[:, 1] == key_block
        columns = np.zeros((block, blocks * block), bool)
        for (query_block, _), kind in zip(pairs[mine], kinds[mine], strict=True):
            columns[:, query_block * block : (query_block + 1) * block] = table[kind].T
        parts.append(_runs(columns[:, :length]))
    intervals = np.moveaxis(_stacked(parts, runs)[:length], 0, -1)
    return Mask(jnp.asarray(intervals), queries=length)


def _runs(columns: Bool[np.ndarray, "n T"]) -> Int[np.ndarray, "n R 2"]:
    """The runs of True of each column, as many as the one with most has, others [0, 0)."""
    steps = np.diff(columns.astype(np.int8), axis=-1, prepend=0, append=0)
    R = int(np.max(np.sum(steps == 1, -1), initial=1))
    intervals = np.zeros((len(columns), R, 2), np.int32)
    for side, value in ((0, 1), (1, -1)):
        column, place = np.nonzero(steps == value)
        intervals[column, np.arange(len(column)) - np.searchsorted(column, column), side] = place
    return intervals


def _stacked(parts: list[np.ndarray], runs: int | None) -> Int[np.ndarray, "n R 2"]:
    """All columns with as many runs each: `runs`, or what the one with most needs."""
    needed = max((part.shape[1] for part in parts), default=1)
    most = MOST_RUNS if runs is None else runs
    if needed > most:
        raise ValueError(
            f"a key is seen in {needed} runs of queries, runs={most}: expected as many; or order "
            "the positions so that those who see each other are neighbours"
        )
    R = needed if runs is None else runs
    padded = [np.pad(part, ((0, 0), (0, R - part.shape[1]), (0, 0))) for part in parts]
    return np.concatenate(padded or [np.zeros((0, R, 2), np.int32)])
