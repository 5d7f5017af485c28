"""The masks of published models, each in one line; they combine by `&` and `|`."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from pallas_kernels.masks.mask import Mask, causal, one_run


def sliding_window(length: int, window: int, *, two_sided: bool = False) -> Mask:
    """Query t sees the last `window` keys, itself among them; two-sided: |t - s| < window."""
    _positive(window=window)
    s = jnp.arange(length)
    start = jnp.maximum(s - window + 1, 0) if two_sided else s
    end = jnp.minimum(s + window, length)
    return Mask(one_run(start, end), causal=not two_sided, queries=length)


def dilated_window(length: int, window: int, dilation: int) -> Mask:
    """Query t sees the `window` keys t, t - dilation, t - 2 dilation, ..."""
    _positive(window=window, dilation=dilation)
    reach = sliding_window(length, (window - 1) * dilation + 1)
    return dataclasses.replace(reach, dilation=dilation)


def global_and_window(
    length: int, global_keys: int, window: int, *, two_sided: bool = False
) -> Mask:
    """A sliding window, and the first keys for everybody; two-sided: and everything for them."""
    if not 0 <= global_keys <= length:
        raise ValueError(f"global_keys={global_keys}: expected 0 to {length}, the length")
    s = jnp.arange(length)
    is_global = s < global_keys
    of_window = sliding_window(length, window, two_sided=two_sided).intervals[0]
    end = jnp.where(is_global, length, of_window[1])
    if not two_sided:
        return Mask(one_run(s, end), causal=True, queries=length)
    mask = Mask(one_run(jnp.where(is_global, 0, of_window[0]), end), queries=length)
    return mask | Mask(one_run(jnp.zeros_like(s), global_keys), queries=length)


def first_keys(length: int, keys: int | Int[Array, "*lead"]) -> Mask:
    """Every query sees the first `keys` keys, and no others; `keys` may differ for each row."""
    end = jnp.where(jnp.arange(length) < jnp.asarray(keys)[..., None], length, 0)
    return Mask(one_run(0, end), queries=length)


def prefix_lm(length: int, prefix: int | Int[Array, "*lead"]) -> Mask:
    """Causal, but all see all of the first `prefix` positions; `prefix` may differ for each row."""
    s = jnp.arange(length)
    start = jnp.where(s < jnp.asarray(prefix)[..., None], 0, s)
    return Mask(one_run(start, length), queries=length)


def left_padding(length: int, padding: Int[Array, "*lead"]) -> Mask:
    """Causal over rows that begin with `padding` positions, which see and are seen by nobody."""
    s = jnp.arange(length)
    end = jnp.where(s >= jnp.asarray(padding)[..., None], length, 0)
    return Mask(one_run(s, end), causal=True, queries=length)


def same_document(segment_ids: Int[Array, "*lead T"]) -> Mask:
    """All of a document sees all of it.

    Args:
      segment_ids: a document is a run of equal ids; id 0 is padding, which sees nothing and is
        seen by nobody.
    """
    ids = jnp.asarray(segment_ids)
    if ids.ndim < 1 or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise ValueError(f"segment ids {ids.shape} of {ids.dtype}: expected integers [..., T]")
    start = jnp.where(ids > 0, _run_starts(ids), 0)
    end = jnp.where(ids > 0, _run_ends(ids), 0)
    return Mask(one_run(start, end), queries=ids.shape[-1])


def packed(segment_ids: Int[Array, "*lead T"]) -> Mask:
    """Causal within each document of a row; ids as in `same_document`."""
    return causal() & same_document(segment_ids)


def _run_ends(ids: Int[Array, "*lead T"]) -> Int[Array, "*lead T"]:
    """Where the run of equal ids around each position ends (exclusive)."""
    border = jnp.ones((*ids.shape[:-1], 1), bool)
    is_last = jnp.concatenate([ids[..., 1:] != ids[..., :-1], border], -1)
    last = jnp.where(is_last, _places(ids), ids.shape[-1])
    return jax.lax.cummin(last, axis=last.ndim - 1, reverse=True) + 1


def _run_starts(ids: Int[Array, "*lead T"]) -> Int[Array, "*lead T"]:
    border = jnp.ones((*ids.shape[:-1], 1), bool)
    is_first = jnp.concatenate([border, ids[..., 1:] != ids[..., :-1]], -1)
    return jax.lax.cummax(jnp.where(is_first, _places(ids), 0), axis=ids.ndim - 1)


def packed_prefix_lm(segment_ids: Int[Array, "*lead T"], is_prefix: Bool[Array, "*lead T"]) -> Mask:
    """Causal within each document, and all of a document sees its prefix.

    Args:
      segment_ids: as in `same_document`.
      is_prefix: which positions belong to the prefix of their document.
    """
    document, is_prefix = same_document(segment_ids), jnp.asarray(is_prefix)
    start = jnp.where(is_prefix, document.intervals[..., 0, 0, :], _places(is_prefix))
    return Mask(one_run(start, document.intervals[..., 0, 1, :]), queries=document.queries)


def packed_block_causal(segment_ids: Int[Array, "*lead T"], block: int) -> Mask:
    """Within each document, position i sees the blocks of `block` positions up to its own, whole.

    Args:
      segment_ids: as in `same_document`.
      block: positions of a block, counted from the start of the document.
    """
    _positive(block=block)
    document = same_document(segment_ids)
    first, end = document.intervals[..., 0, 0, :], document.intervals[..., 0, 1, :]
    start = first + (_places(first) - first) // block * block
    return Mask(one_run(start, end), queries=document.queries)


def shared_question(segment_ids: Int[Array, "*lead T"], answers: Int[Array, "*lead T"]) -> Mask:
    """Causal documents of one question and several answers, which see the question, not each other.

    Args:
      segment_ids: as in `same_document`.
      answers: 0 in the question, else a number for each answer of the document.
    """
    answers = jnp.asarray(answers)
    document_end = same_document(segment_ids).intervals[..., 0, 1, :]
    if answers.shape[-1] != document_end.shape[-1]:
        raise ValueError(
            f"answers {answers.shape} for segment ids {document_end.shape}: expected one length"
        )
    answer_end = jnp.minimum(_run_ends(answers), document_end)
    end = jnp.where(answers > 0, answer_end, document_end)
    return Mask(one_run(_places(end), end), causal=True, queries=end.shape[-1])


def causal_blockwise(segment_ids: Int[Array, "*lead T"]) -> Mask:
    """Causal within each block, and the last block sees everything before it.

    Args:
      segment_ids: a block is a run of equal ids; id 0 is padding, which sees and is seen by nobody.
    """
    ids = jnp.asarray(segment_ids)
    blocks = same_document(ids)
    last = jnp.max(jnp.where(ids > 0, blocks.intervals[..., 0, 0, :], 0), -1, keepdims=True)
    end = jnp.max(blocks.intervals[..., 0, 1, :], -1, keepdims=True)
    of_last = Mask(one_run(last, jnp.where(ids > 0, end, 0)), queries=blocks.queries)
    return causal() & (blocks | of_last)


def next_scale(sizes: Sequence[int], *, diagonal: bool = False) -> Mask:
    """Scales after each other: a position sees its own scale and those before it, all of each.

    Args:
      sizes: positions of each scale, for example 1, 4, 9, 16.
      diagonal: see the own scale only.
    """
    _positive(**{f"sizes[{i}]": size for i, size in enumerate(sizes)})
    length = sum(sizes)
    index = jnp.repeat(jnp.arange(len(sizes)), jnp.array(sizes), total_repeat_length=length)
    end = _run_ends(index) if diagonal else length
    return Mask(one_run(_run_starts(index), end), queries=length)


def tree(parents: Int[Array, "*lead T"]) -> Mask:
    """Positions in depth-first order, each of which sees itself and its ancestors.

    Args:
      parents: the position of each one's parent, which comes before it; -1 for a root.
    """
    parents = jnp.asarray(parents, jnp.int32)
    if not isinstance(parents, jax.core.Tracer) and not bool(jnp.all(parents < _places(parents))):
        raise ValueError("parents: expected each position's parent before it, -1 for a root")
    last = _places(parents)
    ancestor = parents
    # After round n, `last` holds the last descendant at most 2^n - 1 levels below.
    for _ in range(max(parents.shape[-1] - 1, 1).bit_length()):
        last, ancestor = _climb(last, ancestor)
    return Mask(one_run(_places(last), last + 1), causal=True, queries=parents.shape[-1])


@functools.partial(jnp.vectorize, signature="(t),(t)->(t),(t)")
def _climb(last, ancestor):
    known = ancestor >= 0
    target = jnp.where(known, ancestor, last.shape[0])
    last = last.at[target].max(last, mode="drop")
    return last, jnp.where(known, ancestor[jnp.maximum(ancestor, 0)], -1)


def fork_join(forks: Int[Array, "*lead d T"], branches: Int[Array, "*lead d T"]) -> Mask:
    """Causal text that forks into branches, which do not see each other; what follows sees all.

    Forks nest d deep: the mask has d + 1 runs.

    Args:
      forks: for each level of nesting, outermost first, a number for the fork that a position is
        in, 0 for none. Forks that follow each other have different numbers.
      branches: likewise, the branch of that fork.
    """
    forks, branches = jnp.asarray(forks, jnp.int32), jnp.asarray(branches, jnp.int32)
    if forks.ndim < 2 or forks.shape != branches.shape or not forks.shape[-2]:
        raise ValueError(
            f"forks {forks.shape}, branches {branches.shape}: expected both [..., depth, T]"
        )
    depth, length = forks.shape[-2:]
    end = jnp.full_like(forks[..., 0, :], length)
    runs = []
    for level in range(depth):
        inside = forks[..., level, :] > 0
        fork_end = jnp.minimum(_run_ends(forks[..., level, :]), end)
        branch_end = jnp.minimum(_run_ends(branches[..., level, :]), fork_end)
        runs.append(one_run(jnp.where(inside, fork_end, end), end))
        end = jnp.where(inside, branch_end, end)
    runs.append(one_run(_places(end), end))
    return Mask(jnp.concatenate(runs, -3), causal=True, queries=length)


def streams(count: int, length: int, prefix: int, *, shared: bool) -> Mask:
    """Causal streams laid out one after the other in one sequence, which do not see each other.

    Args:
      count, length: number of streams and positions of each.
      prefix: positions of a prefix; it comes once, before all streams, where `shared`, otherwise
        once before each stream.
    """
    if not shared:
        return packed(jnp.repeat(jnp.arange(count) + 1, prefix + length))
    answers = jnp.concatenate([jnp.zeros(prefix, int), jnp.repeat(jnp.arange(count) + 1, length)])
    return shared_question(jnp.ones_like(answers), answers)


def cached(positions: Int[Array, "B T"], length: int) -> Mask:
    """For queries that read a key/value cache whose slot s holds the key of position s.

    Args:
      positions: absolute positions of the queries, consecutive within a row.
      length: slots of the cache [S].
    """
    queries = positions.shape[-1]
    slot = jnp.arange(length, dtype=jnp.int32)
    start = jnp.clip(slot - positions[..., :1].astype(jnp.int32), 0, queries)
    return Mask(one_run(start, queries), queries=queries)


def _places(like: Int[Array, "*lead T"]) -> Int[Array, "*lead T"]:
    return jnp.broadcast_to(jnp.arange(like.shape[-1], dtype=jnp.int32), like.shape)


def _positive(**values: int):
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
