"""Attention as a recurrent network: softmax attention of learned queries over every prefix.

Part of an attention is held as what a merge with other parts needs: `AarenState`. `merge_parts` is
associative, so prefixes come from a scan of logarithmic depth. A part may be one token, a document
so far, or the keys of one device. Source: arXiv 2405.13956.

The scan runs over chunks, for which the part of each prefix is a small masked softmax: that takes
matrix products, and a tenth of the time to compile that a scan over tokens does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.linear.api import count_documents


class AarenState(NamedTuple):
    """Attention of one query over some keys, of scores s and values v: the paper's (m, u, w).

    Nothing seen yet is maximum -inf, total 0, weighted 0. An attention's output and log-sum-exp are
    the part `AarenState(lse, jnp.ones_like(lse), out)`.

    Attributes:
      maximum: m, the largest score.
      total: u, sum of exp(s - m).
      weighted: w, sum of exp(s - m) v; the output is w / u.
    """

    maximum: Float[Array, "*lead H"]
    total: Float[Array, "*lead H"]
    weighted: Float[Array, "*lead H hv"]


def merge_parts(a: AarenState, b: AarenState) -> AarenState:
    """Attention over the keys of both parts.

    Associative and commutative. A part of maximum -inf has no keys, whatever else is in it; values
    and gradients stay finite. The log-sum-exp of the result is `maximum + log(total)`.

    Args:
      a, b: parts of one shape, or of shapes that broadcast.
    """
    no_a, no_b = a.maximum == -jnp.inf, b.maximum == -jnp.inf
    # The larger maximum has the factor 1, and its derivative by it is 0, not a sum that cancels.
    gap = jnp.where(no_a | no_b, 0.0, a.maximum - b.maximum)
    of_a = jnp.where(no_a, 0.0, jnp.exp(jnp.minimum(gap, 0.0)))
    of_b = jnp.where(no_b, 0.0, jnp.exp(jnp.minimum(-gap, 0.0)))
    return AarenState(
        jnp.maximum(a.maximum, b.maximum),
        of_a * a.total + of_b * b.total,
        of_a[..., None] * a.weighted + of_b[..., None] * b.weighted,
    )


def aaren(
    q: Float[Array, "H h"],
    k: Float[Array, "*lead T H h"],
    v: Float[Array, "*lead T H hv"],
    *,
    scale: float | None = None,
    segment_ids: Int[Array, "*some T"] | None = None,
    initial_state: AarenState | None = None,
    restart_state: AarenState | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "*lead T H hv"], AarenState]:
    """Softmax attention of one learned query for each head over the keys up to each position.

    Time and memory are linear in T. Scores and sums are float32, also for narrower inputs. In
    gradients the maximum over tokens is a constant, the unit in which a state is held.

    Args:
      q: the queries, which no input changes.
      k, v: keys and values; any leading axes, usually B, P.
      scale: of the scores; h ** -0.5 by default.
      segment_ids: the document of each token, with leading axes that are those of k from the left.
        0 is padding: its output is zero and the state passes it unchanged. A token of another
        document than the last token before it that was no padding starts anew.
      initial_state: what the first document of a row goes on from: float32, with the leading axes
        of k or only the last of them, P. None: as `restart_state`.
      restart_state: what documents start from, with axis P alone; None: nothing seen.
      chunk: tokens whose prefixes are computed at once.

    Returns:
      the output in v's dtype, zero where nothing was seen, and the state after the last token,
      which a call with the tokens after it takes as `initial_state`.

    Raises:
      ValueError: arguments that do not fit together.
    """
    _check_arguments(q, k, v, segment_ids, initial_state, restart_state, chunk)
    lead, (T, H, hv) = v.shape[:-3], v.shape[-3:]
    wide, axis = jnp.result_type(jnp.float32, q, k, v), len(lead)
    start = _whole(restart_state, (*lead, H), hv, wide)
    first = start if initial_state is None else _whole(initial_state, (*lead, H), hv, wide)
    if not T:
        return jnp.zeros(v.shape, v.dtype), first
    padding, documents = _read_segments(segment_ids, axis, T)
    # What stands in padding may be anything, also NaN.
    k, v = (jnp.where(padding[..., None], 0, x) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * jnp.sum(k.astype(wide) * q.astype(wide), -1)
    size = min(chunk, T)
    scores = _chunks(jnp.where(padding, -jnp.inf, scores), axis, size, constant_values=-jnp.inf)
    values = _chunks(v.astype(wide), axis, size)
    documents = _chunks(documents, axis, size, mode="edge")
    # Tokens of documents that began in their own chunk, `[*lead, n, C, 1]`.
    last = jnp.pad(documents[..., :-1, -1:], [(0, 0)] * axis + [(1, 0), (0, 0)])
    fresh = (documents != last)[..., None]

    parts = _prefixes_of_chunks(scores, values, documents)
    if restart_state is not None:
        parts = merge_parts(_keep(fresh, _expand(start, axis, axis + 1)), parts)
    ends = jax.tree.map(
        lambda x, y: jnp.concatenate([x, jax.lax.index_in_dim(y, -1, axis + 1, False)], axis),
        _expand(first, axis), parts,
    )  # fmt: skip
    begins = jnp.pad(fresh[..., -1, :], [(0, 0)] * axis + [(1, 0), (0, 0)])
    _, ends = jax.lax.associative_scan(_merge_documents, (begins, ends), axis=axis)
    before = jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, -1, axis=axis), ends)
    parts = merge_parts(_keep(~fresh, _expand(before, axis + 1)), parts)

    sees = parts.total > 0.0
    out = jnp.where(sees[..., None], parts.weighted, 0.0)
    out = out / jnp.where(sees, parts.total, 1.0)[..., None]
    out = jax.lax.slice_in_dim(out.reshape(*lead, -1, H, hv), 0, T, axis=axis)
    out = jnp.where(padding[..., None], 0.0, out).astype(v.dtype)
    return out, jax.tree.map(lambda x: jax.lax.index_in_dim(x, -1, axis, False), ends)


def _prefixes_of_chunks(
    scores: Float[Array, "*lead n C H"],
    values: Float[Array, "*lead n C H hv"],
    documents: Int[Array, "*some n C"],
) -> AarenState:
    """The part of every token: itself and those before it in its chunk and document."""
    C = scores.shape[-2]
    same = documents[..., :, None] == documents[..., None, :]
    visible = (same & np.tri(C, dtype=bool))[..., None, :, :]
    scores = jnp.where(visible, scores.swapaxes(-1, -2)[..., None, :], -jnp.inf)
    maximum = jax.lax.stop_gradient(jnp.max(scores, -1))
    unit = jnp.where(maximum > -jnp.inf, maximum, 0.0)
    weights = jnp.exp(scores - unit[..., None])
    weighted = jnp.einsum("...hij,...jhv->...ihv", weights, values, precision="highest")
    total = jnp.sum(weights, -1)
    return AarenState(maximum.swapaxes(-1, -2), total.swapaxes(-1, -2), weighted)


def _merge_documents(a, b):
    """Merges pairs (begins, part); a part in which a document begins forgets what came before."""
    (a_begins, a), (b_begins, b) = a, b
    return a_begins | b_begins, merge_parts(_keep(~b_begins, a), b)


def _keep(condition: Bool[Array, "*lead 1"], state: AarenState) -> AarenState:
    """The state where the condition holds, elsewhere nothing seen."""
    maximum, total, weighted = state
    return AarenState(
        jnp.where(condition, maximum, -jnp.inf),
        jnp.where(condition, total, 0.0),
        jnp.where(condition[..., None], weighted, 0.0),
    )


def _read_segments(segment_ids, axis, T):
    """Which tokens are padding, `[*lead, T, 1]`, and the number of each one's document."""
    if segment_ids is None:
        nowhere = jnp.zeros([1] * axis + [T], jnp.int32)
        return nowhere[..., None] > 0, nowhere
    lead = segment_ids.shape[:-1]
    shape = (*lead, *[1] * (axis - len(lead)), T)
    return segment_ids.reshape(*shape, 1) == 0, count_documents(segment_ids).reshape(shape)


def _chunks(x: Array, axis: int, size: int, **how) -> Array:
    """`x` with its axis in chunks, two axes, the last chunk filled up as `jnp.pad` is told."""
    padding = [(0, 0)] * x.ndim
    padding[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, padding, **how)
    return x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])


def _expand(state: AarenState, *axes: int) -> AarenState:
    return jax.tree.map(lambda x: jnp.expand_dims(x, axes), state)


def _whole(state: AarenState | None, shape, hv, dtype) -> AarenState:
    """The state with all axes; nothing seen for None."""
    state = AarenState(-jnp.inf, 0.0, 0.0) if state is None else state
    shapes = shape, shape, (*shape, hv)
    return AarenState(
        *(jnp.broadcast_to(jnp.asarray(x, dtype), s) for x, s in zip(state, shapes, strict=True))
    )


def _check_arguments(q, k, v, segment_ids, initial_state, restart_state, chunk):
    """Raises ValueError, with the shapes, for arguments that do not fit together."""
    fits = q.ndim == 2 and k.ndim >= 3 and k.ndim == v.ndim and 0 not in q.shape + v.shape[-1:]
    if not fits or k.shape[-2:] != q.shape or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected q [H, h], k [..., T, H, h] and "
            "v [..., T, H, hv] with equal leading axes, positions and heads"
        )
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype is {x.dtype}: expected a floating type")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1")
    lead, (T, H, hv) = v.shape[:-3], v.shape[-3:]
    if segment_ids is not None:
        axes, dtype = segment_ids.shape[:-1], segment_ids.dtype
        fits = axes == lead[: len(axes)] and segment_ids.shape[-1:] == (T,)
        if not fits or not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(
                f"segment_ids {segment_ids.shape} of {dtype}: expected integers [..., {T}] with "
                f"leading axes that are those of k, {lead}, from the left"
            )
    for name, state in (("initial_state", initial_state), ("restart_state", restart_state)):
        if state is None:
            continue
        leads = [lead[-1:]] + [lead] * (name == "initial_state")
        shapes = [tuple(x.shape for x in state)] if len(state) == 3 else []
        expected = [((*axes, H), (*axes, H), (*axes, H, hv)) for axes in leads]
        if not shapes or shapes[0] not in expected:
            raise ValueError(
                f"{name} of shapes {[x.shape for x in state]}: expected an AarenState of "
                f"{' or '.join(map(str, expected))}"
            )
