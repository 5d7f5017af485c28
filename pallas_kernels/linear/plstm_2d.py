"""pLSTM on a grid: two states, one that travels right and one that travels down.

A square cell of the grid is one linear map: from the states on the edges that enter it and the
sources of its nodes, to the outputs of its nodes and the states on the edges that leave it. Four
neighbours make a cell of twice the side. Cells as large as the grid are the parallel form, cells of
one node the recurrent one; between them the states walk over the cells, a diagonal at a time.
Source: arXiv 2506.11997.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.grid_gates import GridGates
from pallas_kernels.linear.plstm import check_arguments, check_power_of_two, scale_or_default

FLIPS = (), ("X",), ("Y",), ("Y", "X")
"""The orientations: axes that are walked backwards."""


class GridState(NamedTuple):
    """States on the border of a grid, float32.

    Attributes:
      right: that travel right, over the left border (entering) or the right one (leaving).
      down: that travel down, over the upper border or the lower one.
    """

    right: Float[Array, "*lead Y H hk hv"]
    down: Float[Array, "*lead X H hk hv"]


def plstm_2d(
    q: Float[Array, "*lead Y X H hk"],
    k: Float[Array, "*lead Y X H hk"],
    v: Float[Array, "*lead Y X H hv"],
    gates: GridGates,
    *,
    scale: float | None = None,
    initial_state: GridState | None = None,
    cell: int = 4,
) -> tuple[Float[Array, "*lead Y X H hv"], GridState]:
    """The recurrence of pLSTM in two dimensions, from the upper left to the lower right.

    With R[y, x] and D[y, x] the states that leave a node to the right and downwards, and its gates
    by the names of their edges (L left, U up):

        R[y, x] = T^RL R[y, x-1] + T^RU D[y-1, x] + S^R k v^T
        D[y, x] = T^DL R[y, x-1] + T^DU D[y-1, x] + S^D k v^T
        out[y, x] = scale ((M^L R[y, x-1] + M^U D[y-1, x])^T q + direct (q . k) v)

    States and sums are float32, also for narrower inputs.

    Args:
      q, k, v: queries, keys and values of the nodes; any leading axes.
      gates: of the nodes; `grid_gates` makes stable ones.
      scale: of the outputs; hk ** -0.5 by default.
      initial_state: what enters the grid; zero by default.
      cell: side of the cells, a power of 2: 1 is the recurrent form, at least Y and X the parallel
        one, with every pair of nodes in memory.

    Returns:
      the output in v's dtype, and the states that leave the grid.

    Raises:
      ValueError: arguments that do not fit together.
    """
    check_arguments(q, k, v, gates._asdict(), axes=2)
    check_power_of_two("cell", cell)
    lead, (Y, X, H, hk), hv = q.shape[:-4], q.shape[-4:], v.shape[-1]
    shapes = (*lead, Y, H, hk, hv), (*lead, X, H, hk, hv)
    wide = jnp.result_type(jnp.float32, q, k, v)
    if initial_state is None:
        initial_state = GridState(*(jnp.zeros(shape, wide) for shape in shapes))
    if tuple(x.shape for x in initial_state) != shapes:
        raise ValueError(
            f"initial_state of shapes {[x.shape for x in initial_state]}: expected a GridState of "
            f"{shapes[0]} and {shapes[1]}"
        )
    initial_state = GridState(*(x.astype(wide) for x in initial_state))
    if 0 in (Y, X):
        return jnp.zeros(v.shape, v.dtype), initial_state
    side, axis = min(cell, 1 << (max(Y, X) - 1).bit_length()), len(lead) + 1

    def by_head(x, filler=0.0):
        """`[*lead, Y, X, H, ...]` as `[*lead, H, Y', X', ...]`, filled up to whole cells."""
        x = jnp.moveaxis(x.astype(wide), axis + 1, axis - 1)
        fill = [(0, -Y % side), (0, -X % side)]
        padding = [(0, 0)] * axis + fill + [(0, 0)] * (x.ndim - axis - 2)
        return jnp.pad(x, padding, constant_values=filler)

    # Nodes of the filling pass on what enters them.
    entries = [by_head(x) for x in (gates.mark_left, gates.mark_up, gates.direct)]
    entries += [by_head(gates.right_from_left, 1.0), by_head(gates.right_from_up)]
    entries += [by_head(gates.source_right), by_head(gates.down_from_left)]
    entries += [by_head(gates.down_from_up, 1.0), by_head(gates.source_down)]
    maps = jnp.stack(entries, -1).reshape(*entries[0].shape, 3, 3)
    size = 1
    while size < side:
        maps = _join_neighbours(maps, size)
        size *= 2
    q, k, values = (_to_cells(by_head(x), axis, side) for x in (q, k, v))
    q = scale_or_default(scale, hk) * q
    nodes = side * side
    pairs = maps[..., :nodes, 2 * side :]
    scores = jnp.einsum("...ik,...jk->...ij", q, k, precision="highest")
    out = jnp.einsum("...ij,...jv->...iv", scores * pairs, values, precision="highest")
    between, end = _walk(maps, q, k, values, initial_state, side, axis)
    out = _from_cells(out + between, axis, side)[..., :Y, :X, :]
    out = jnp.moveaxis(out, axis - 1, axis + 1)
    return out.astype(v.dtype), end


def _join_neighbours(
    maps: Float[Array, "*some Y X outs ins"], side: int
) -> Float[Array, "*some Y2 X2 outs2 ins2"]:
    """The maps of cells of twice the side, each of four neighbours.

    Rows of a map are the outputs of a cell's nodes, then what leaves: on the right by row, below by
    column. Columns are what enters: on the left by row, above by column; then the nodes' sources.
    The nodes are those of the upper left cell of the four, upper right, lower left, lower right.
    """
    nodes = side * side
    enters = jnp.eye(4 * side, 4 * (side + nodes), dtype=maps.dtype)
    left_above, left_below, up_left, up_right = jnp.split(enters, 4)

    def cell(place, left, up):
        """Outputs, what leaves to the right and downwards, over the columns of the joint map."""
        own = maps[..., place // 2 :: 2, place % 2 :: 2, :, :]
        through = own[..., 2 * side :]
        columns = (4 * side + place * nodes, (3 - place) * nodes)
        through = jnp.pad(through, [(0, 0)] * (maps.ndim - 1) + [columns])
        for x, edge in ((left, 0), (up, 1)):
            part = own[..., edge * side : (edge + 1) * side]
            through += jnp.matmul(part, x, precision="highest")
        return jnp.split(through, [nodes, nodes + side], -2)

    out_0, right_0, down_0 = cell(0, left_above, up_left)
    out_1, right_1, down_1 = cell(1, right_0, up_right)
    out_2, right_2, down_2 = cell(2, left_below, down_0)
    out_3, right_3, down_3 = cell(3, right_2, down_1)
    rows = (out_0, out_1, out_2, out_3, right_1, right_3, down_2, down_3)
    return jnp.concatenate(rows, -2)


def _walk(maps, q, k, v, initial: GridState, side: int, axis: int):
    """What the states that enter each cell add to its outputs, and the states that leave the grid.

    Args:
      maps, q, k, v: of the cells, `[*lead, H, Y, X, ...]`; q is scaled.
      initial: what enters the grid, with axes as in `plstm_2d`.
    """
    Y, X = maps.shape[axis : axis + 2]
    nodes = side * side

    def border(x, cells):
        """`[*lead, Y, H, hk, hv]` as `[*lead, H, cells, side, hk, hv]`."""
        x = jnp.moveaxis(x, axis, axis - 1)
        padding = [(0, 0)] * axis + [(0, cells * side - x.shape[axis]), (0, 0), (0, 0)]
        return jnp.pad(x, padding).reshape(*x.shape[:axis], cells, side, *x.shape[axis + 1 :])

    def inner(x, length):
        """The other way."""
        x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
        return jnp.moveaxis(jax.lax.slice_in_dim(x, 0, length, axis=axis), axis - 1, axis)

    right, top = border(initial.right, Y), border(initial.down, X)
    top = jnp.pad(top, [(0, 0)] * axis + [(0, Y - 1)] + [(0, 0)] * 3)
    # On diagonal d, row y is at column d - y.
    columns = jnp.arange(X + Y - 1)[:, None] - jnp.arange(Y)
    inside = ((columns >= 0) & (columns < X))[..., None, None, None]
    skewed = [jnp.moveaxis(_skew(x, axis), axis + 1, 0) for x in (maps, q, k, v)]

    def step(states, xs):
        right, down = states
        maps, q, k, v, top, inside = xs
        down = jnp.concatenate([jnp.expand_dims(top, axis), down], axis)
        down = jax.lax.slice_in_dim(down, 0, Y, axis=axis)
        entering = jnp.concatenate([right, down], axis + 1)
        marks, through = maps[..., :nodes, : 2 * side], maps[..., nodes:, : 2 * side]
        sources = maps[..., nodes:, 2 * side :]
        einsum = functools.partial(jnp.einsum, precision="highest")
        out = einsum("...ne,...nk,...ekv->...nv", marks, q, entering)
        leaving = einsum("...oe,...ekv->...okv", through, entering)
        leaving += einsum("...on,...nk,...nv->...okv", sources, k, v)
        new_right, down = jnp.split(leaving, 2, axis + 1)
        # Before its first column a row holds what enters it, after its last what leaves.
        right = jnp.where(inside, new_right, right)
        return (right, down), (out, jax.lax.index_in_dim(down, Y - 1, axis, keepdims=False))

    xs = (*skewed, jnp.moveaxis(top, axis, 0), inside)
    (right, _), (out, bottom) = jax.lax.scan(step, (right, jnp.zeros_like(right)), xs)
    bottom = jnp.moveaxis(bottom[Y - 1 :], 0, axis)
    shape = initial.right.shape[axis - 1], initial.down.shape[axis - 1]
    end = GridState(inner(right, shape[0]), inner(bottom, shape[1]))
    return _unskew(jnp.moveaxis(out, 0, axis + 1), axis, X), end


def _skew(x: Array, axis: int) -> Array:
    """`[.., Y, X, ..]` to `[.., Y, X + Y - 1, ..]`: row y is shifted by y to the right."""
    Y, X = x.shape[axis : axis + 2]
    x = jnp.pad(x, [(0, 0)] * (axis + 1) + [(0, Y)] + [(0, 0)] * (x.ndim - axis - 2))
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    x = jax.lax.slice_in_dim(x, 0, Y * (X + Y - 1), axis=axis)
    return x.reshape(*x.shape[:axis], Y, X + Y - 1, *x.shape[axis + 1 :])


def _unskew(x: Array, axis: int, X: int) -> Array:
    """The inverse of `_skew`."""
    Y = x.shape[axis]
    x = x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    x = jnp.pad(x, [(0, 0)] * axis + [(0, Y)] + [(0, 0)] * (x.ndim - axis - 1))
    x = x.reshape(*x.shape[:axis], Y, X + Y, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(x, 0, X, axis=axis + 1)


def _to_cells(x: Array, axis: int, side: int) -> Array:
    """`[.., Y, X, h]` as `[.., Y/side, X/side, side^2, h]`, nodes in the order of the joins."""
    bits = side.bit_length() - 1
    Y, X = x.shape[axis : axis + 2]
    rest = x.shape[axis + 2 :]
    x = x.reshape(*x.shape[:axis], Y // side, *[2] * bits, X // side, *[2] * bits, *rest)
    x = jnp.moveaxis(x, axis + 1 + bits, axis + 1)
    for bit in range(bits):
        x = jnp.moveaxis(x, axis + 2 + bits + bit, axis + 3 + 2 * bit)
    return x.reshape(*x.shape[: axis + 2], side * side, *rest)


def _from_cells(x: Array, axis: int, side: int) -> Array:
    """The inverse of `_to_cells`."""
    bits = side.bit_length() - 1
    Y, X = x.shape[axis : axis + 2]
    rest = x.shape[axis + 3 :]
    x = x.reshape(*x.shape[:axis], Y, X, *[2] * (2 * bits), *rest)
    for bit in reversed(range(bits)):
        x = jnp.moveaxis(x, axis + 3 + 2 * bit, axis + 2 + bits + bit)
    x = jnp.moveaxis(x, axis + 1, axis + 1 + bits)
    return x.reshape(*x.shape[:axis], Y * side, X * side, *rest)


def every_orientation(
    q: Float[Array, "*lead Y X H hk"],
    k: Float[Array, "*lead Y X H hk"],
    v: Float[Array, "*lead Y X H hv"],
    gates: Sequence[GridGates],
    *,
    scale: float | None = None,
    cell: int = 4,
) -> Float[Array, "*lead Y X H hv"]:
    """The mean of `plstm_2d` from all four corners, so that every node sees every other.

    Args:
      q, k, v: as for `plstm_2d`.
      gates: four of them, which may be the same: of the walk from the upper left, upper right,
        lower left and lower right. Right is where a walk's rows lead, down where its columns do.
      scale, cell: as for `plstm_2d`.

    Returns:
      the output in v's dtype.
    """
    if len(gates) != len(FLIPS):
        raise ValueError(f"{len(gates)} sets of gates: expected {len(FLIPS)}, one for each corner")
    check_arguments(q, k, v, {}, axes=2)
    place = {"Y": q.ndim - 4, "X": q.ndim - 3}
    axes = [[place[axis] for axis in flips] for flips in FLIPS]
    walks = [
        jax.tree.map(lambda x, axes=axes: jnp.flip(x, axes), (q, k, v, own))
        for own, axes in zip(gates, axes, strict=True)
    ]
    q, k, v, gates = jax.tree.map(lambda *parts: jnp.stack(parts), *walks)
    out, _ = plstm_2d(q, k, v, gates, scale=scale, cell=cell)
    wide = jnp.result_type(jnp.float32, out)
    parts = [jnp.flip(x, own).astype(wide) for x, own in zip(out, axes, strict=True)]
    return (sum(parts) / len(parts)).astype(out.dtype)
