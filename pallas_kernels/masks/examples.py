"""One mask of every kind, of one length: for tests, benchmarks and pictures."""

from collections.abc import Callable, Mapping

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


def example(name: str, rows: int, length: int) -> Mask:
    """A mask of `length` queries and keys; those of data differ for each row.

    Args:
      name: one of `EXAMPLES`.
    """
    return EXAMPLES[name](rows, length)


def all_masks(rows: int, length: int) -> dict[str, Mask]:
    """Every example by name."""
    return {name: example(name, rows, length) for name in EXAMPLES}


def _window(length):
    return max(length // 32, 1)


def _stripes(length, count):
    """0, 1, ... of stripes as wide as the window, over and over."""
    return jnp.arange(length) // _window(length) % count


def _mesh(rows, length):
    block = max(length // 12, 1)
    pairs = [(i, j) for i in range(12) for j in range(12) if (i * 5 + j * 3) % 4 == 0]
    pairs = [pair for pair in pairs if max(pair) * block < length]
    return explicit.from_blocks(pairs, length, block)


def _private_streams(rows, length):
    count, prefix = 1 + (length % 2 == 0), length // 8
    return kinds.streams(count, length // count - prefix, prefix, shared=False)


def _scales(length):
    """Squares of 1, 2, 3, 5, 8, ... as far as they fit, and the rest."""
    sides = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    sizes, left = [], length
    for side in sides:
        if side**2 < left:
            sizes.append(side**2)
            left -= side**2
    return (*sizes, left)


EXAMPLES: Mapping[str, Callable[[int, int], Mask]] = {
    "full": lambda rows, T: mask.full(),
    "causal": lambda rows, T: mask.causal(),
    "sliding_window": lambda rows, T: kinds.sliding_window(T, _window(T)),
    "sliding_window, two-sided": lambda rows, T: kinds.sliding_window(
        T, _window(T), two_sided=True
    ),
    "dilated_window": lambda rows, T: kinds.dilated_window(T, _window(T), 4),
    "global_and_window": lambda rows, T: kinds.global_and_window(T, _window(T), _window(T)),
    "global_and_window, two-sided": lambda rows, T: kinds.global_and_window(
        T, _window(T), _window(T), two_sided=True
    ),
    "prefix_lm": lambda rows, T: kinds.prefix_lm(T, T // 4 + jnp.arange(rows)),
    "left_padding": lambda rows, T: kinds.left_padding(T, T // 8 * jnp.arange(rows)),
    "same_document": lambda rows, T: kinds.same_document(documents(rows, T)),
    "packed": lambda rows, T: kinds.packed(documents(rows, T)),
    "packed_prefix_lm": lambda rows, T: kinds.packed_prefix_lm(
        documents(rows, T), _stripes(T, 2) == 0
    ),
    "packed_block_causal": lambda rows, T: kinds.packed_block_causal(
        documents(rows, T), _window(T)
    ),
    "shared_question": lambda rows, T: kinds.shared_question(documents(rows, T), _stripes(T, 3)),
    "causal_blockwise": lambda rows, T: kinds.causal_blockwise(documents(rows, T)),
    "next_scale": lambda rows, T: kinds.next_scale(_scales(T)),
    "next_scale, diagonal": lambda rows, T: kinds.next_scale(_scales(T), diagonal=True),
    "tree": lambda rows, T: kinds.tree(random_tree(rows, T)),
    "fork_join": lambda rows, T: kinds.fork_join(*forks(T)),
    "streams, shared prefix": lambda rows, T: kinds.streams(
        3, T // 4, T - 3 * (T // 4), shared=True
    ),
    "streams, private prefixes": _private_streams,
    "from_blocks": _mesh,
    "packed & sliding_window": lambda rows, T: (
        kinds.packed(documents(rows, T)) & kinds.sliding_window(T, _window(T))
    ),
}
