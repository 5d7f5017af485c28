"""The compiled steps of the generation engine: writing many tokens, and generating a few.

Both work on rows, each a branch of P streams, whose views are lists of blocks of one pool
(`models.block_cache`). What differs from call to call are arrays; what is compiled for are numbers
of rows, tokens and blocks, rounded up, and whether views move blocks or have parts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.block_cache import Parts, View, with_states, without_states
from parscale.sampling import Choice, choose
from sharding import rules

NO_TOKEN = -1


class Seen(NamedTuple):
    """What rows see before a pass; `n` blocks at most.

    Attributes:
      blocks: int32 `[B, P, n]`.
      counts: int32 `[B, n]`, the slots seen of each.
      shifts: int32 `[B, n]`, or None if nothing moves.
      parts: int32 `[B, n]`, or None if every row has one part.
      temperatures, factors: float32 `[B, parts]` of the parts, or None.
    """

    blocks: Int[Array, "B P n"]
    counts: Int[Array, "B n"]
    shifts: Int[Array, "B n"] | None = None
    parts: Int[Array, "B n"] | None = None
    temperatures: Float[Array, "B parts"] | None = None
    factors: Float[Array, "B parts"] | None = None

    def view(self, counts: Array, places: Array, key_positions: Array | None) -> View:
        """The view of a pass, given where its tokens go."""
        shape = self.blocks.shape
        spread = lambda x: None if x is None else jnp.broadcast_to(x[:, None], shape)
        parts = self.parts
        if parts is not None:
            parts = Parts(spread(parts), self.temperatures, self.factors)
        counts, shifts = spread(counts), spread(self.shifts)
        return View(self.blocks, counts, places, key_positions, shifts, parts)


class Rows(NamedTuple):
    """Rows that generate.

    Attributes:
      token: int32 `[B]`, the last token of each, not yet in the cache.
      positions: int32 `[B]`, where it stands.
      key_positions: int32 `[B]`, what its key is rotated by; None: as it stands.
      branches: int32 `[B]`, marks of branches; None: no model of these has any.
      tail: int32 `[B]`, the place in the row's list of the block that it is written to; those after
        it are empty and follow when it is full.
      filled: int32 `[B]`, slots of that block that are full.
      nobodys: int32 `[B, P]`, blocks for rows that have ended.
      most: int32 `[B]`, tokens to generate; 0 for a row that is none.
      until: int32 `[B, k]`, tokens that end a row; NO_TOKEN for none.
      races: int32 `[B]`, the same number for rows of which the first to end ends the others; None:
        every row ends by itself.
    """

    token: Int[Array, "B"]
    positions: Int[Array, "B"]
    key_positions: Int[Array, "B"] | None
    branches: Int[Array, "B"] | None
    tail: Int[Array, "B"]
    filled: Int[Array, "B"]
    nobodys: Int[Array, "B P"]
    most: Int[Array, "B"]
    until: Int[Array, "B k"]
    races: Int[Array, "B"] | None = None


class Tokens(NamedTuple):
    """Tokens to write.

    Attributes:
      ids: int32 `[B, T]`, those of a row first, then padding.
      lengths: int32 `[B]`, how many are no padding, at least 1.
      positions: int32 `[B, T]`.
      key_positions: int32 `[B, T]`; None: as positions.
      branches: int32 `[B, T]`; None: no model of these has any.
      places: int32 `[B, P, T]`, as in `View`.
    """

    ids: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    positions: Int[Array, "B T"]
    key_positions: Int[Array, "B T"] | None
    branches: Int[Array, "B T"] | None
    places: Int[Array, "B P T"]


@functools.partial(jax.jit, static_argnames=("graph", "method"), donate_argnames="pools")
def write(
    graph: nnx.GraphDef,
    params: Any,
    pools: tuple,
    states: tuple,
    tokens: Tokens,
    seen: Seen,
    choice: Choice,
    method: str,
) -> tuple[Int[Array, "B"], tuple, tuple]:
    """Writes tokens behind what rows see, and chooses the next of each.

    Returns:
      the token after each row's last, the pools, and the rows' states.
    """
    model = nnx.merge(graph, params)
    real = jnp.arange(tokens.ids.shape[1]) < tokens.lengths[:, None]
    x, cache = model.run_streams(
        tokens.ids,
        positions=tokens.positions,
        segment_ids=real.astype(jnp.int32),
        branches=tokens.branches,
        cache=with_states(pools, states),
        view=seen.view(seen.counts, tokens.places, tokens.key_positions),
    )
    last = (tokens.lengths - 1)[:, None]
    x = jnp.take_along_axis(x, last[:, :, None, None], 2)
    logits = model.logits(model.mix(x))[:, 0]
    positions = jnp.take_along_axis(tokens.positions, last, 1)[:, 0] + 1
    return choose(logits, choice, positions, method), *without_states(cache)


@functools.partial(
    jax.jit, static_argnames=("graph", "steps", "method"), donate_argnames=("pools", "states")
)
def generate(
    graph: nnx.GraphDef,
    params: Any,
    pools: tuple,
    states: tuple,
    rows: Rows,
    seen: Seen,
    choice: Choice,
    steps: int,
    method: str,
) -> tuple[Int[Array, "B steps"], tuple, tuple]:
    """Up to `steps` tokens of each row.

    A row that has ended writes to nobody's block, and its states stay as they are.

    Returns:
      the tokens, NO_TOKEN after a row's end; the pools and the states.
    """
    model = nnx.merge(graph, params)
    leaves = jax.tree.leaves(pools)
    slots, held = leaves[0].shape[-2] if leaves else 0, seen.blocks.shape[-1]
    place_in_list = jnp.arange(held, dtype=jnp.int32)

    def step(carry, index):
        token, alive, pools, states = carry
        positions = rows.positions + index
        later = lambda x: None if x is None else (x + index)[:, None]
        logits, cache = model(
            token[:, None],
            positions=positions[:, None],
            branches=None if rows.branches is None else rows.branches[:, None],
            cache=with_states(pools, states),
            view=view(index, alive, later(rows.key_positions)) if slots else None,
        )
        pools, new_states = without_states(cache)
        keep = lambda new, old: jnp.where(_along(alive, new, model.state_axis), new, old)
        states = jax.tree.map(keep, new_states, states)
        new = choose(logits[:, 0], choice, positions + 1, method)
        out = jnp.where(alive, new, NO_TOKEN)
        ended = jnp.any(new[:, None] == rows.until, 1) | (index + 1 >= rows.most)
        if rows.races is not None:
            first = jnp.zeros_like(alive).at[rows.races].max(alive & ended)
            ended = first[rows.races]
        return (new, alive & ~ended, pools, states), out

    def view(index, alive, key_positions):
        written = rows.filled + index
        block = jnp.minimum(rows.tail + written // slots, held - 1)
        block = jnp.take_along_axis(seen.blocks, block[:, None, None], 2)[..., 0]
        places = block * slots + (written % slots)[:, None]
        places = jnp.where(alive[:, None], places, rows.nobodys * slots)
        own = jnp.clip(written[:, None] - (place_in_list - rows.tail[:, None]) * slots, 0, slots)
        counts = jnp.where(place_in_list >= rows.tail[:, None], own, seen.counts)
        return seen.view(counts, places[..., None], key_positions)

    start = (rows.token, rows.most > 0, pools, states)
    (_, _, pools, states), out = jax.lax.scan(step, start, jnp.arange(steps, dtype=jnp.int32))
    return out.T, pools, states


def _along(rows: Array, x: Array, axis: int) -> Array:
    """`rows` `[B]` with further axes of size 1, so that it meets axis `axis` of `x`."""
    return rows.reshape(*[1] * axis, -1, *[1] * (x.ndim - axis - 1))


@functools.cache
def of_graph(graph: nnx.GraphDef) -> tuple[Callable, Callable]:
    """`write` and `generate` of one graph, which is not to be looked at again at every call."""
    write_it = functools.partial(write.__wrapped__, graph)
    generate_it = functools.partial(generate.__wrapped__, graph)
    return (
        jax.jit(write_it, static_argnames="method", donate_argnames="pools"),
        jax.jit(
            generate_it, static_argnames=("steps", "method"), donate_argnames=("pools", "states")
        ),
    )


@functools.partial(jax.jit, static_argnames=("graph", "blocks", "slots"))
def new_pools(graph: nnx.GraphDef, params: Any, blocks: int, slots: int) -> tuple:
    """A cache of `blocks` blocks, which lie over the devices of rows and streams."""
    pools = nnx.merge(graph, params).init_blocks(blocks, slots)
    axes = ("blocks", "kv_heads", None, None)
    return jax.tree.map(lambda x: rules.constrain(x, *(None,) * (x.ndim - 4), *axes), pools)


@functools.partial(jax.jit, static_argnames=("graph", "rows"))
def new_states(graph: nnx.GraphDef, params: Any, rows: int) -> tuple:
    """What rows remember before any token."""
    return nnx.merge(graph, params).init_states(rows)


@functools.partial(jax.jit, static_argnames="graph", donate_argnames="pools")
def write_soft_tokens(
    graph: nnx.GraphDef, params: Any, pools: tuple, states: tuple, view: View
) -> tuple[tuple, tuple]:
    """The pools and the states after the soft tokens."""
    model = nnx.merge(graph, params)
    return without_states(model.write_soft_tokens(with_states(pools, states), view))


@functools.partial(jax.jit, static_argnames="axis", donate_argnames="states")
def put_states(states: tuple, row: Int[Array, ""], some: tuple, axis: int) -> tuple:
    """The states of rows, those from `row` on being `some`."""
    put = lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), row, axis)
    return jax.tree.map(put, states, some)


@functools.partial(jax.jit, static_argnames=("count", "axis"))
def take_states(states: tuple, row: Int[Array, ""], count: int, axis: int) -> tuple:
    """The states of `count` rows from `row` on."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, count, axis), states)
