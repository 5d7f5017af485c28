"""One mask of every kind, of one shape, for tests of the implementations of attention."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks
from pallas_kernels.masks import Mask


def documents(rows, length, seed=0):
    """Ids of documents of random lengths, with padding at the end of the first row."""
    borders = np.random.default_rng(seed).random((rows, length)) < 0.05
    ids = np.cumsum(borders, 1) + 1
    ids[0, -(length // 6 + 1) :] = 0
    return jnp.asarray(ids)


def random_tree(rows, length, seed=0):
    """Parents of positions in depth-first order."""
    random = np.random.default_rng(seed)
    parents = np.full((rows, length), -1)
    for row in range(rows):
        path = [0]
        for t in range(1, length):
            path = path[: random.integers(max(len(path) - 3, 1), len(path) + 1)]
            parents[row, t] = path[-1]
            path.append(t)
    return jnp.asarray(parents)


def forks(length):
    """Forks and branches: a stem, three branches of which one forks again, and a join."""
    place = np.arange(length) * 12 // length
    outer = (place >= 2) & (place < 10)
    inner = (place >= 3) & (place < 5)
    branches = np.stack([np.select([place < 5, place < 7], [1, 2], 3), place - 2])
    inside = np.stack([outer, inner])
    return jnp.asarray(inside), jnp.asarray(branches * inside)


def all_masks(rows: int, length: int) -> dict[str, Mask]:
    """Masks of every kind for `rows` rows of `length` positions, each made by one call."""
    ids = documents(rows, length)
    place = jnp.arange(length)
    window = max(length // 8, 1)
    block = max(length // 6, 1)
    neighbours = [(i, j) for i in range(6) for j in range(6) if (i * 5 + j * 3) % 4 == 0]
    neighbours = [pair for pair in neighbours if max(pair) * block < length]
    return {
        "full": masks.full(),
        "causal": masks.causal(),
        "window": masks.sliding_window(length, window),
        "two_sided_window": masks.sliding_window(length, window, two_sided=True),
        "global_and_window": masks.global_and_window(length, 3, window),
        "two_sided_global": masks.global_and_window(length, 3, window, two_sided=True),
        "prefix_lm": masks.prefix_lm(length, jnp.arange(rows) * 7 + 3),
        "left_padding": masks.left_padding(length, jnp.arange(rows) * 5),
        "same_document": masks.same_document(ids),
        "packed": masks.packed(ids),
        "packed_prefix_lm": masks.packed_prefix_lm(ids, place % 9 < 4),
        "packed_block_causal": masks.packed_block_causal(ids, 8),
        "shared_question": masks.shared_question(ids, place // 6 % 3),
        "causal_blockwise": masks.causal_blockwise(ids),
        "next_scale": masks.next_scale((length // 4 or 1, length - (length // 4 or 1)))
        if length > 1
        else masks.next_scale((1,)),
        "next_scale_diagonal": masks.next_scale((1,) * length, diagonal=True),
        "tree": masks.tree(random_tree(rows, length)),
        "fork_join": masks.fork_join(*forks(length)),
        "dilated_window": masks.dilated_window(length, window, 3),
        "streams_shared": masks.streams(1, length - length // 3, length // 3, shared=True),
        "streams_private": masks.streams(1, length - length // 3, length // 3, shared=False),
        "from_blocks": masks.from_blocks(neighbours, length, block),
        "packed_and_window": masks.packed(ids) & masks.sliding_window(length, window),
    }


def same_shape(mask: Mask, rows: int, length: int, runs: int) -> Mask:
    """The same visibility, but as `runs` runs for each row and nothing static but the dilation."""
    nothing = Mask(jnp.zeros((rows, 1, 2, length), jnp.int32), queries=length)
    plain = dataclasses.replace(mask, dilation=1, queries=length)
    if mask.intervals is None and not mask.causal:
        plain = masks.first_keys(length, length)
    intervals = (plain | nothing).intervals
    padding = [(0, 0)] * intervals.ndim
    padding[-3] = (0, runs - intervals.shape[-3])
    return Mask(jnp.pad(intervals, padding), dilation=mask.dilation)
