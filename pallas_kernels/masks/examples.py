"""One mask of every kind, of one length: for tests, benchmarks and pictures."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from pallas_kernels.masks import explicit, kinds, mask
from pallas_kernels.masks.mask import Mask


def documents(rows: int, length: int, seed: int = 0) -> Int[Array, "rows length"]:
    """Ids of about ten documents a row, of random lengths; the first row ends in padding."""
    borders = np.random.default_rng(seed).random((rows, length)) < min(10 / length, 1)
    ids = np.cumsum(borders, 1) + 1
    ids[0, -(length // 6 + 1) :] = 0
    return jnp.asarray(ids)


def random_tree(rows: int, length: int, seed: int = 0) -> Int[Array, "rows length"]:
    """Parents of positions in depth-first order: runs of about 20 positions that fork."""
    random = np.random.default_rng(seed)
    parents = np.full((rows, length), -1)
    for row in range(rows):
        path = [0]
        for t in range(1, length):
            if random.random() < 0.05:
                del path[random.integers(0, len(path)) + 1 :]
            parents[row, t] = path[-1]
            path.append(t)
    return jnp.asarray(parents)


def forks(length: int) -> tuple[Int[Array, "2 length"], Int[Array, "2 length"]]:
    """Forks and branches: a stem, three branches of which one forks again, and a join."""
    place = np.arange(length) * 12 // length
    inside = np.stack([(place >= 2) & (place < 10), (place >= 3) & (place < 5)]).astype(np.int32)
    branches = np.stack([np.select([place < 5, place < 7], [1, 2], 3), place - 2])
    return jnp.asarray(inside), jnp.asarray(branches * inside)


def all_masks(rows: int, length: int) -> dict[str, Mask]:
    """Masks by name, each for `length` queries and keys; those of data differ for each row."""
    ids = documents(rows, length)
    place = jnp.arange(length)
    window = max(length // 32, 1)
    block = max(length // 12, 1)
    mesh = [(i, j) for i in range(12) for j in range(12) if (i * 5 + j * 3) % 4 == 0]
    mesh = [pair for pair in mesh if max(pair) * block < length]
    count, prefix = 1 + (length % 2 == 0), length // 8
    return {
        "full": mask.full(),
        "causal": mask.causal(),
        "sliding_window": kinds.sliding_window(length, window),
        "sliding_window, two-sided": kinds.sliding_window(length, window, two_sided=True),
        "dilated_window": kinds.dilated_window(length, window, 4),
        "global_and_window": kinds.global_and_window(length, window, window),
        "global_and_window, two-sided": kinds.global_and_window(
            length, window, window, two_sided=True
        ),
        "prefix_lm": kinds.prefix_lm(length, length // 4 + jnp.arange(rows)),
        "left_padding": kinds.left_padding(length, length // 8 * jnp.arange(rows)),
        "same_document": kinds.same_document(ids),
        "packed": kinds.packed(ids),
        "packed_prefix_lm": kinds.packed_prefix_lm(ids, place % (2 * window) < window),
        "packed_block_causal": kinds.packed_block_causal(ids, window),
        "shared_question": kinds.shared_question(ids, place // (2 * window) % 3),
        "causal_blockwise": kinds.causal_blockwise(ids),
        "next_scale": kinds.next_scale(_scales(length)),
        "next_scale, diagonal": kinds.next_scale(_scales(length), diagonal=True),
        "tree": kinds.tree(random_tree(rows, length)),
        "fork_join": kinds.fork_join(*forks(length)),
        "streams, shared prefix": kinds.streams(
            3, length // 4, length - 3 * (length // 4), shared=True
        ),
        "streams, private prefixes": kinds.streams(
            count, length // count - prefix, prefix, shared=False
        ),
        "from_blocks": explicit.from_blocks(mesh, length, block),
        "packed & sliding_window": kinds.packed(ids) & kinds.sliding_window(length, window),
    }


def _scales(length):
    """Squares of 1, 2, 3, 5, 8, ... as far as they fit, and the rest."""
    sides = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    sizes, left = [], length
    for side in sides:
        if side**2 < left:
            sizes.append(side**2)
            left -= side**2
    return (*sizes, left)
