"""How the tiled XLA form of attention cuts its arrays: rows, chains, pairs and blocks.

And what it shares with the form in strips.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.masks import blocks

BLOCK = 64  # queries, and keys, of a tile
TILE_SCORES = 2**15  # of the (sequence, head) pairs that are computed together
# XLA's CPU backend runs a small product on one core: so many independent ones occupy several.
CHAINS = 4


class Tiling(NamedTuple):
    """How the work is cut. A pair is one key/value head of one sequence.

    Attributes:
      rows: entries of axis N in one step of the outer loop; its pairs are `chunks` in turn of
        `chains` side by side of `pairs` in one product.
      q_blocks, k_blocks: blocks along T and S, the last one padded.
    """

    rows: int
    chunks: int
    chains: int
    pairs: int
    q_blocks: int
    k_blocks: int


def tiling(q, k, mask, prefix) -> Tiling:
    """The tiling for arrays of these shapes."""
    N, P, T, K, G, _ = q.shape
    most = max(1, TILE_SCORES // (G * BLOCK**2))
    rows = divisor(N, CHAINS * most // (P * K))
    if prefix is not None:
        # Rows that share a step would each need their own copy of the prefix.
        rows = 1
    pairs = divisor(P * K, most)
    chains = divisor(rows * P * K // pairs, CHAINS)
    return Tiling(
        rows=rows,
        chunks=rows * P * K // pairs // chains,
        chains=chains,
        pairs=pairs,
        q_blocks=-(-T // BLOCK),
        k_blocks=-(-k.shape[2] // BLOCK),
    )


def divisor(n: int, most: int) -> int:
    """The largest divisor of n that is at most `most`, and at least 1."""
    return max(d for d in range(1, n + 1) if n % d == 0 and d <= max(most, 1))


def lists(tiling, mask, q, k) -> blocks.RowLists:
    """For each step of the outer loop and block of queries the blocks of keys that a row sees."""
    kinds = blocks.block_kinds(mask, q.shape[2], k.shape[2], BLOCK, BLOCK)
    steps = q.shape[0] // tiling.rows
    if kinds.ndim == 2 or kinds.shape[0] == 1:
        kinds = jnp.asarray(kinds).reshape(1, -1, *kinds.shape[-2:])
    else:
        kinds = kinds.reshape(steps, -1, *kinds.shape[-2:])
    # One list for all rows and streams of a step.
    alike = jnp.min(kinds, 1) == jnp.max(kinds, 1)
    rows = blocks.row_lists(jnp.where(alike, kinds[:, 0], blocks.PARTIAL))
    rows = rows._replace(kinds=None)
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (steps, *x.shape[1:])), rows)


def by_rows(tiling, q, arrays):
    """Each `[N or 1, ...]` as `[N / rows, rows or 1, ...]`: a step of the outer loop each."""

    def split(x):
        steps = q.shape[0] // tiling.rows
        if x.shape[0] == 1 < q.shape[0]:
            return jnp.broadcast_to(x, (steps, *x.shape))
        return x.reshape(steps, tiling.rows, *x.shape[1:])

    return jax.tree.map(split, arrays)


def to_blocks(tiling, x):
    """`[rows, P, T, K, (G,) h]`, for each chain as float32 `[chunks, blocks, pairs, G * BLOCK, h]`.

    Float32 whatever the type of x, since CPUs are slower at products of narrower types.
    """
    x = x.astype(jnp.float32)
    if x.ndim == 5:
        x = x[:, :, :, :, None]
    T, G, h = x.shape[2], *x.shape[4:]
    blocks = -(-T // BLOCK)
    x = jnp.pad(x, [(0, blocks * BLOCK - T) if axis == 2 else (0, 0) for axis in range(6)])
    x = x.reshape(*x.shape[:2], blocks, BLOCK, *x.shape[3:])
    x = x.transpose(0, 1, 4, 2, 5, 3, 6)
    x = x.reshape(tiling.chunks, tiling.chains, tiling.pairs, blocks, G * BLOCK, h)
    return tuple(x[:, c].swapaxes(1, 2) for c in range(tiling.chains))


def from_blocks(chains, shape, dtype):
    """The inverse of `to_blocks`."""
    rows, P, T, K, *_, h = shape
    x = jnp.stack([x.swapaxes(1, 2) for x in chains], 1)
    blocks = x.shape[3]
    x = x.reshape(rows, P, K, blocks, -1, BLOCK, h)
    x = x.transpose(0, 1, 3, 5, 2, 4, 6).reshape(rows, P, blocks * BLOCK, *shape[3:])
    return x[:, :, :T].astype(dtype)


def mask_blocks(tiling, intervals, k_shape):
    """`[rows or 1, P or 1, R, 2, S]` as what `xla._biases` takes, with a leading axis of chunks."""
    if intervals is None:
        return None
    rows, P, S, K, _ = k_shape
    *axes, R, two, _ = intervals.shape
    padding = tiling.k_blocks * BLOCK - S
    x = jnp.pad(intervals, [(0, 0)] * 4 + [(0, padding)])
    x = x.reshape(*axes, 1, R, two, tiling.k_blocks, BLOCK)
    x = jnp.moveaxis(x, -2, 2)
    if axes == [1, 1]:
        return (jnp.broadcast_to(x[0], (tiling.chunks, *x.shape[2:])),)
    x = jnp.broadcast_to(x, (rows, P, *x.shape[2:]))
    x = jnp.repeat(x, K, 3)
    # A chain's pairs are of one row, and share its mask unless streams have their own.
    x = jnp.moveaxis(x, 2, 1).reshape(rows, tiling.k_blocks, P * K, R, two, BLOCK)
    x = jnp.moveaxis(x, 1, 2).reshape(
        tiling.chunks, tiling.chains, tiling.pairs, *x.shape[1:2], R, two, BLOCK
    )
    x = jnp.moveaxis(x, 3, 2)
    x = x[:, :, :, :1] if axes[1] == 1 else x
    return tuple(x[:, c] for c in range(tiling.chains))


def prefix_chains(tiling, prefix):
    """`[P, K, M, h]`, for each chain as float32 `[chunks, pairs, M, h]`."""
    if prefix is None:
        return None
    axes = (tiling.chunks, tiling.chains, tiling.pairs)
    prefix = [x.reshape(*axes, *x.shape[2:]).astype(jnp.float32) for x in prefix]
    return tuple(tuple(x[:, c] for c in range(tiling.chains)) for x in prefix)


def dot(a, b, axis_a, axis_b):
    """Float32 products over one axis of each, for each entry of axis 0."""
    dims = (((axis_a,), (axis_b,)), ((0,), (0,)))
    return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)
