"""A cache of keys and values in blocks, and attention over views of it.

A block holds the keys and values of a few tokens of one stream in one layer. What a stream of a row
sees is a view: an ordered list of blocks, of each the first so many slots. Views share blocks, so a
fork of a text, or a join of its branches, copies nothing. Keys are rotated by the positions that
they were written at; a view may move a block to others, for which its keys are rotated by the
difference as they are read (Hogwild! Inference, arXiv 2504.06261). Blocks of a view may belong to
parts that are attended to apart, each with a temperature, and merged by their log-sum-exps (APE,
arXiv 2502.05431).

Block 0 of the memory of each device belongs to nobody: padding is written there.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.layers import apply_rope, rope_tables
from pallas_kernels import attention
from pallas_kernels.linear.aaren import AarenState, merge_parts
from pallas_kernels.masks import Mask
from pallas_kernels.masks.mask import one_run
from sharding import rules


class BlockPool(NamedTuple):
    """The blocks of a layer, or those of a stack of layers and the one meant.

    Attributes:
      k, v: `[blocks, K, slots, h]`, or `[L, blocks, K, slots, h]` of a stack.
      layer: which of a stack; None: there is none.
    """

    k: Float[Array, "blocks K slots h"]
    v: Float[Array, "blocks K slots h"]
    layer: Int[Array, ""] | None = None


class Parts(NamedTuple):
    """How parts of a view count; a query's own text, and prefixes, are part 0.

    The output is that of all parts, each weighted by exp(factor * lse), where lse is the
    log-sum-exp of its scores over the temperature: a temperature and a factor of 1 for all of them
    is one attention over everything.

    Attributes:
      of_block: int32 `[B, P, n]`, the part that each block of a view belongs to.
      temperature, factor: float32 `[B, parts]`.
    """

    of_block: Int[Array, "B P n"]
    temperature: Float[Array, "B parts"]
    factor: Float[Array, "B parts"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class View:
    """What each stream of each row sees besides the tokens of this pass, and where these go.

    Attributes:
      blocks: int32 `[B, P, n]`, in any order: positions are in the keys.
      counts: int32 `[B, P, n]`, how many slots of each are seen. A pass of one token also sees the
        place that it writes, if that one's block is in the list; one of more tokens sees its own
        by its mask, and they must not be among these slots.
      places: int32 `[B, P, T]`, where each token of this pass is written: its block times slots,
        plus its slot. Tokens of other rows that are written in this pass can be seen by it.
      key_positions: int32 `[B, T]`, what the pass's keys are rotated by as they are written, where
        a later view moves their blocks; None: as the queries.
      shifts: int32 `[B, P, n]`, the positions that each block is moved by; None: all stay.
      parts: None: one part.
    """

    blocks: Int[Array, "B P n"]
    counts: Int[Array, "B P n"]
    places: Int[Array, "B P T"]
    key_positions: Int[Array, "B T"] | None = None
    shifts: Int[Array, "B P n"] | None = None
    parts: Parts | None = None


def with_states(pools: tuple, states: tuple) -> tuple:
    """A model's cache: of each layer its blocks, or where it has none its states."""
    return tuple(state if pool is None else pool for pool, state in zip(pools, states, strict=True))


def without_states(cache: tuple) -> tuple[tuple, tuple]:
    """The blocks and the states of a cache, None where a layer has the other."""
    pools = tuple(node if isinstance(node, BlockPool) else None for node in cache)
    states = tuple(None if isinstance(node, BlockPool) else node for node in cache)
    return pools, states


def attend_view(
    q: Float[Array, "B P T H h"],
    k: Float[Array, "B P T K h"],
    v: Float[Array, "B P T K h"],
    pool: BlockPool,
    view: View,
    mask: Mask,
    prefix: tuple[Array, Array] | None,
    rope_theta: float,
    kept: Float[Array, "B P T K h"] | None = None,
) -> tuple[Float[Array, "B P T H h"], BlockPool]:
    """Attention to a view and among the tokens of a pass, and the pool with their keys and values.

    On a mesh the blocks lie over the devices of rows and streams: each holds those that its own
    rows and streams see.

    Args:
      q, k: queries and keys, rotated by the positions of their tokens.
      v: values of the same tokens.
      pool: the layer's blocks.
      view: what is seen.
      mask: who sees whom among the tokens of this pass.
      prefix: keys and values `[P, K, M, h]` that every query sees.
      rope_theta: of the rotation by which blocks are moved.
      kept: the keys as they are written, if not as `k`.
    """
    run = functools.partial(_attend, rope_theta)
    if prefix is not None:
        prefix = tuple(part.astype(q.dtype) for part in prefix)
    if not rules.is_sharded():
        return run(q, k, v, kept, pool, view, mask, prefix)
    queries = rules.partition_spec(("batch", "streams", None, "heads", None))
    keys = rules.partition_spec(("batch", "streams", None, "kv_heads", None))
    stack = () if pool.layer is None else (None,)
    blocks = rules.partition_spec((*stack, "blocks", "kv_heads", None, None))
    pools = BlockPool(blocks, blocks, None if pool.layer is None else rules.partition_spec(()))
    lists = rules.partition_spec(("batch", "streams", None))
    rows = rules.partition_spec(("batch", None))
    # `key_positions` are spent: the keys are rotated already.
    view = dataclasses.replace(view, key_positions=None)
    shifts = None if view.shifts is None else lists
    parts = None if view.parts is None else Parts(lists, rows, rows)
    views = View(lists, lists, lists, None, shifts, parts)
    slots = rules.partition_spec(("streams", "kv_heads", None, None))
    prefixes = None if prefix is None else (slots, slots)
    masks = jax.tree.map(_of_runs, mask)
    in_keys = (keys, keys, None if kept is None else keys)
    local = jax.shard_map(
        lambda *x: run(*x[:5], _local(view=x[5], pool=x[4]), *x[6:]),
        in_specs=(queries, *in_keys, pools, views, masks, prefixes),
        out_specs=(queries, pools),
        check_vma=False,
    )
    return local(q, k, v, kept, pool, view, mask, prefix)


def _of_runs(intervals: Array) -> jax.sharding.PartitionSpec:
    """The partition of a mask's intervals, whose leading axes may be missing or 1."""
    lead = zip(intervals.shape[:-3], ("batch", "streams"), strict=False)
    return rules.partition_spec(tuple(None if n == 1 else axis for n, axis in lead))


def _local(view: View, pool: BlockPool) -> View:
    """A view whose block numbers count from the first of this device."""
    index = 0
    for axis in rules.RULES["blocks"]:
        index = index * jax.lax.axis_size(axis) + jax.lax.axis_index(axis)
    blocks, _, slots, _ = pool.k.shape[-4:]
    first = index * blocks
    return dataclasses.replace(view, blocks=view.blocks - first, places=view.places - first * slots)


def _attend(rope_theta, q, k, v, kept, pool, view, mask, prefix):
    """`attend_view` of one device."""
    pool = _write(pool, k if kept is None else kept, v, view.places)
    length = q.shape[2]
    if length > 1 and not view.blocks.shape[-1]:
        return attention(q, k, v, mask, prefix=prefix), pool
    keys, values = (_read(pool, x, view.blocks) for x in (pool.k, pool.v))
    if view.shifts is not None:
        keys = _move(keys, view.shifts, rope_theta)
    slots = keys.shape[-2]
    slot = jnp.arange(slots, dtype=jnp.int32)
    visible = slot < view.counts[..., None]
    if length == 1:
        visible |= view.blocks[..., None] * slots + slot == view.places[..., None]
    visible = visible.reshape(*visible.shape[:2], -1)
    # What is not seen may be of another text, or of none: a weight of 0 does not undo a NaN. The
    # keys need it not, but XLA on CPU takes less time to choose than to copy blocks as they are.
    flat = lambda x: x.reshape(*x.shape[:3], -1, x.shape[-1])
    keys, values = (jnp.where(visible[:, :, None, :, None], flat(x), 0) for x in (keys, values))
    if length == 1 and view.parts is None:
        return _attend_one(q, keys, values, visible, prefix), pool
    keys, values = jnp.swapaxes(keys, 2, 3), jnp.swapaxes(values, 2, 3)
    runs = one_run(jnp.zeros_like(visible, jnp.int32), jnp.where(visible, length, 0))
    if length > 1:
        keys, values = jnp.concatenate([keys, k], 2), jnp.concatenate([values, v], 2)
        runs = _with_own_runs(runs, mask, length)
    if view.parts is None:
        return attention(q, keys, values, Mask(runs, queries=length), prefix=prefix), pool
    of_block, temperature, factor = view.parts
    part = jnp.repeat(of_block, slots, -1)
    part = jnp.pad(part, ((0, 0), (0, 0), (0, keys.shape[2] - part.shape[-1])))
    results = []
    for number in range(temperature.shape[-1]):
        of_part = jnp.where((part == number)[:, :, None, None], runs, 0)
        out, lse = attention(
            (q / temperature[:, number, None, None, None, None]).astype(q.dtype),
            keys,
            values,
            Mask(of_part, queries=length),
            prefix=None if number else prefix,
            return_lse=True,
        )
        # A part of which nothing is seen counts for nothing, also where its factor is 0.
        weight = lse * factor[:, number, None, None, None]
        weight = jnp.where(jnp.isfinite(lse), weight, lse)
        results.append(AarenState(weight, jnp.ones_like(weight), out))
    _, total, out = functools.reduce(merge_parts, results)
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype), pool


def _with_own_runs(runs: Array, mask: Mask, length: int) -> Array:
    """Runs of a view's keys, then those of the pass's own."""
    place = jnp.arange(length, dtype=jnp.int32)
    own = (mask & Mask(one_run(place if mask.causal else 0 * place, length))).intervals
    own = own.reshape(*own.shape[:-3], *[1] * (5 - own.ndim), *own.shape[-3:])
    own = jnp.broadcast_to(own, (*runs.shape[:2], *own.shape[-3:]))
    runs = jnp.pad(runs, ((0, 0), (0, 0), (0, own.shape[2] - 1), (0, 0), (0, 0)))
    return jnp.concatenate([runs, own], -1)


def _attend_one(q, keys, values, visible, prefix):
    """Attention of one query for each stream of each row: of all scores at once."""
    batch, streams, _, heads, head_dim = q.shape
    kv_heads = keys.shape[2]
    q = q.reshape(batch, streams, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    wide = {"preferred_element_type": jnp.promote_types(q.dtype, jnp.float32)}
    scores = jnp.einsum("bpkgh,bpksh->bpkgs", q, keys, **wide)
    scores = jnp.where(visible[:, :, None, None], scores, -jnp.inf)
    if prefix is not None:
        of_prefix = jnp.einsum("bpkgh,pkmh->bpkgm", q, prefix[0], **wide)
        scores = jnp.concatenate([scores, of_prefix], -1)
    # Finite, so that a row which sees nothing gets zero.
    least = jnp.finfo(scores.dtype)
    weights = jnp.exp(scores - jnp.max(scores, -1, keepdims=True, initial=least.min))
    total = jnp.maximum(jnp.sum(weights, -1, keepdims=True), least.tiny)
    weights = (weights / total).astype(values.dtype)
    seen = keys.shape[3]
    out = jnp.einsum("bpkgs,bpksh->bpkgh", weights[..., :seen], values)
    if prefix is not None:
        out += jnp.einsum("bpkgm,pkmh->bpkgh", weights[..., seen:], prefix[1])
    return out.reshape(batch, streams, 1, heads, head_dim)


def _blocks(pool: BlockPool, x: Array) -> tuple[Array, Array | int]:
    """The blocks of all layers in a row, and the first of the pool's layer."""
    if pool.layer is None:
        return x, 0
    return x.reshape(-1, *x.shape[2:]), pool.layer * x.shape[1]


def _write(pool: BlockPool, k: Array, v: Array, places: Array) -> BlockPool:
    def written(x, new):
        blocks, first = _blocks(pool, x)
        heads, slots, head_dim = blocks.shape[1:]
        block, slot = jnp.divmod(places[..., None], slots)
        at = ((block + first) * heads + jnp.arange(heads)) * slots + slot
        new = new.astype(x.dtype).reshape(-1, head_dim)
        flat = blocks.reshape(-1, head_dim).at[at.reshape(-1)]
        return flat.set(new, mode="promise_in_bounds").reshape(x.shape)

    return pool._replace(k=written(pool.k, k), v=written(pool.v, v))


def _read(pool: BlockPool, x: Array, blocks: Array) -> Array:
    """The blocks of a view `[B, P, K, n, slots, h]`."""
    held, first = _blocks(pool, x)
    heads = held.shape[1]
    # As one row for each head: XLA on CPU copies rows, and walks through anything else.
    rows = held.reshape(-1, math.prod(held.shape[2:]))
    of_head = (blocks + first)[:, :, None] * heads + jnp.arange(heads)[:, None]
    read = jnp.take(rows, of_head.reshape(-1), axis=0, mode="clip")
    return read.reshape(*of_head.shape, *held.shape[2:])


def _move(keys: Array, shifts: Array, theta: float) -> Array:
    """Keys `[B, P, K, n, slots, h]` of blocks, rotated on by the shift `[B, P, n]` of each."""
    tables = rope_tables(shifts.reshape(-1, shifts.shape[-1]), keys.shape[-1], theta)
    return apply_rope(keys.reshape(-1, *keys.shape[2:]), tables).reshape(keys.shape)
