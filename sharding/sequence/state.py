"""How the state of a recurrence passes over the parts of a sequence, one part a device.

What a part does to a state is a map: some of what came in stays, and something is added. Each
device knows its own map; the state before its part is what the maps of all parts before it make of
the state before the sequence. Only maps and states travel, whatever the length.

- "gather": every device gathers all maps and goes through those before it.
- "steps": in step s = 1, 2, 4, ... every device composes its map with that of s devices before it;
  after log2 n steps it has that of all parts up to its own (arXiv 2404.02882 passes states in n).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.linear.api import count_documents
from sharding import sequence


def pass_states(
    first: Any,
    move: Any,
    added: Any,
    *,
    parts: int,
    after: Callable[[Any, Any, Any], Any],
    join: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """The state before each device's part and that after the last, within `shard_map`.

    Args:
      first: the state before the sequence, the same on all devices of the axis.
      move, added: this part's map, which makes `after(move, state, added)` of a state; `added` is
        what it makes of an empty one.
      parts: devices along the axis.
      after: as just said.
      join: `join(later, earlier)`: the move of two parts.

    Returns:
      the state that comes into this device's part, and the state after all parts, on all devices.
    """
    index = jax.lax.axis_index(sequence.AXIS)
    if sequence.state_scheme(parts) == "gather":
        maps = jax.lax.all_gather((move, added), sequence.AXIS)
        end, before = jax.lax.scan(lambda state, m: (after(m[0], state, m[1]), state), first, maps)
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 0, False), before), end
    step = 1
    while step < parts:
        their_move, their_added = _from_before((move, added), step, parts)
        composed = join(move, their_move), after(move, their_added, added)
        move, added = choose(index >= step, composed, (move, added))
        step *= 2
    own_end = after(move, first, added)
    before = choose(index > 0, _from_before(own_end, 1, parts), first)
    is_last = index == parts - 1
    end = jax.tree.map(lambda x: jnp.where(is_last, x, 0), own_end)
    return before, jax.lax.psum(end, sequence.AXIS)


def tokens_before(x: Array, count: int, first: Array, axis: int, parts: int) -> Array:
    """The `count` positions before each device's part, within `shard_map`.

    Args:
      x: this device's part, of at least `count` positions.
      first: what stands before the first part.
      axis: that of positions.
      parts: devices along the mesh axis.
    """
    last = jax.lax.slice_in_dim(x, x.shape[axis] - count, x.shape[axis], axis=axis)
    return choose(jax.lax.axis_index(sequence.AXIS) > 0, _from_before(last, 1, parts), first)


class Borders(NamedTuple):
    """Of the documents of one device's part of a row, with axes `[..., t]` or `[...]`.

    Attributes:
      ids: of its tokens.
      continues: whether its first document goes on from the part before; where there are only
        tokens of padding, the state does.
      through: whether it has no other.
      in_last: tokens of its last document, and of padding after it.
    """

    ids: Int[Array, "*some t"]
    continues: Bool[Array, "*some"]
    through: Bool[Array, "*some"]
    in_last: Bool[Array, "*some t"]


def borders(segment_ids: Int[Array, "*some T"], length: int) -> Borders:
    """The borders in a device's part of `length` tokens, given the ids of the whole row."""
    documents = count_documents(segment_ids)
    start = jax.lax.axis_index(sequence.AXIS) * length

    def part(x, size):
        return jax.lax.dynamic_slice_in_dim(x, start, size, x.ndim - 1)

    padding = [(0, 0)] * (documents.ndim - 1) + [(1, 0)]
    before = part(jnp.pad(documents, padding), 1)
    ids, documents = part(segment_ids, length), part(documents, length)
    is_live = ids != 0
    first = jnp.min(documents, -1, initial=jnp.iinfo(jnp.int32).max, where=is_live)
    last = documents[..., -1:]
    return Borders(
        ids,
        ~jnp.any(is_live, -1) | (first == before[..., 0]),
        (last == before)[..., 0],
        documents == last,
    )


def choose(condition: Array, x: Any, y: Any) -> Any:
    """`x` or `y`, trees of arrays, by a condition whose axes are their first ones."""

    def of(x, y):
        rank = max(jnp.ndim(x), jnp.ndim(y))
        return jnp.where(condition.reshape(*condition.shape, *[1] * (rank - condition.ndim)), x, y)

    return jax.tree.map(of, x, y)


def _from_before(tree, step, parts):
    """What the device `step` before this one has; zero where there is none."""
    route = [(device, device + step) for device in range(parts - step)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, sequence.AXIS, route), tree)
