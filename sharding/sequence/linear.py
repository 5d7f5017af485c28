"""Linear attention whose positions lie over the mesh axis `sequence`, in consecutive parts.

Only states travel (`sharding.sequence.state`): what a part adds to an empty state, and what it
leaves of the one that comes in.

Without the delta rule what it leaves is a decay, and what it adds is one product of all keys and
values; the op then runs once, from the right state. With the delta rule what it leaves is a matrix
for each head: the columns of the final state, if the op is given the identity to start from. So it
runs once too, with hk columns more whose values are zero; its outputs in these columns, times the
state that comes in, are what that state adds to the outputs. That costs less than to run it twice,
since all that depends on queries and keys is shared by the columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import NormalizedState, linear_attention
from pallas_kernels.linear.api import check_arguments
from pallas_kernels.linear.options import LOWEST
from sharding import sequence
from sharding.sequence.state import Borders, borders, choose, pass_states

GATES = ("log_decay", "beta", "input_gate")
STATES = ("initial_state", "restart_state")


def sequence_linear_attention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    *,
    q_spec: PartitionSpec,
    v_spec: PartitionSpec,
    **arguments,
) -> tuple[Float[Array, "*lead T H hv"], Array | NormalizedState]:
    """`pallas_kernels.linear_attention` on the ambient mesh, by the ambient scheme.

    Args:
      q, k, v, arguments: as for `linear_attention`; gates and states are sharded as leading axes,
        positions and heads of v, segment ids as leading axes.
      q_spec, v_spec: partition of q and k, and of v, one entry for each axis, the same for both:
        that of positions `sequence`, that of head dimensions None.

    Raises:
      InputError: positions do not divide over the axis.
      ValueError: what `linear_attention` raises.
    """
    arrays = {name: arguments.pop(name, None) for name in (*GATES, "segment_ids", *STATES)}
    normalize = arguments.pop("normalize", False)
    ids = arrays["segment_ids"]
    check_arguments(
        q, k, v, {name: arrays[name] for name in GATES}, normalize, ids,
        *(arrays[name] for name in STATES),
    )  # fmt: skip
    parts = jax.sharding.get_abstract_mesh().shape[sequence.AXIS]
    sequence.check_length(q.shape[-3], parts)
    *lead, length, heads, _ = v_spec

    def of_state(state):
        # It may lack all but the last of the leading axes.
        matrix = state[0] if normalize else state
        axes = lead if matrix.ndim == v.ndim else lead[-1:]
        return jax.tree.map(lambda _: PartitionSpec(*axes, heads), state)

    specs = {name: PartitionSpec(*lead, length, heads) for name in GATES}
    specs["segment_ids"] = None if ids is None else PartitionSpec(*lead[: ids.ndim - 1])
    specs |= {name: of_state(arrays[name]) for name in STATES if arrays[name] is not None}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    end = PartitionSpec(*lead, heads)
    run = _delta_rule if "beta" in arrays else _decaying
    return jax.shard_map(
        functools.partial(run, parts, normalize, arguments),
        in_specs=(q_spec, q_spec, v_spec, {name: specs[name] for name in arrays}),
        out_specs=(v_spec, NormalizedState(end, end, end) if normalize else end),
        check_vma=False,
    )(q, k, v, arrays)


def _decaying(parts, normalize, options, q, k, v, arrays):
    first, again, border = _prepare(normalize, q, v, arrays)
    gates = [arrays.get(name) for name in ("log_decay", "input_gate")]
    move, added = _summary(normalize, k, v, *gates, border, again)
    before, end = pass_states(first, move, added, parts=parts, after=_decayed, join=jnp.add)
    arrays = arrays | {"initial_state": before}
    if border is not None:
        before = choose(_of_lead(border.continues, v), before, again)
        arrays |= {"initial_state": before, "segment_ids": border.ids}
    strip = lambda state: state if normalize else state.matrix
    arrays["initial_state"] = strip(arrays["initial_state"])
    out, _ = linear_attention(q, k, v, **arrays, normalize=normalize, **options)
    return out, strip(end)


def _decayed(move, state: NormalizedState, added: NormalizedState) -> NormalizedState:
    """What is left of a state, and what is added; `move` is the logarithm of the decay, `[.., H]`
    or `[.., H, hk]`."""
    rank = state.matrix.ndim
    if state.maximum is None:
        kept = _column(jnp.exp(move), rank) * state.matrix
        return NormalizedState(kept + added.matrix, None, None)
    fixed = jax.lax.stop_gradient
    maximum = fixed(jnp.maximum(state.maximum + move, added.maximum))
    of_state = jnp.exp(fixed(state.maximum) + move - maximum)
    of_added = jnp.exp(fixed(added.maximum) - maximum)
    sums = [
        _column(of_state, x.ndim) * x + _column(of_added, x.ndim) * y
        for x, y in zip(state[:2], added[:2], strict=True)
    ]
    return NormalizedState(*sums, maximum)


def _summary(normalize, k, v, log_decay, input_gate, border: Borders | None, again):
    """The logarithm of what a part leaves of a state, `[.., H]` or `.. hk`, and what it adds."""
    wide, heads = again.matrix.dtype, v.shape[-2]
    T = v.ndim - 3
    precision = "highest" if v.dtype == wide else None
    decay = jnp.zeros(v.shape[:-1], wide) if log_decay is None else log_decay.astype(wide)
    decay = jnp.maximum(decay, LOWEST)
    gate = jnp.zeros(v.shape[:-1], wide) if input_gate is None else input_gate.astype(wide)
    k = jnp.repeat(k.astype(wide), heads // k.shape[-2], axis=-2)
    v = v.astype(wide)
    of_last = decay
    if border is not None:
        is_live = _of_lead(border.ids != 0, v, 1)
        k, v = (jnp.where(_column(is_live, x.ndim), x, 0) for x in (k, v))
        decay = jnp.where(_column(is_live, decay.ndim), decay, 0)
        gate = jnp.where(_column(is_live, gate.ndim), gate, LOWEST)
        in_last = _of_lead(border.in_last, v, 1)
        of_last = jnp.where(_column(in_last, decay.ndim), decay, 0)
    whole = jnp.sum(of_last, T)
    # The sum of the decays after each token, not a difference of sums: these may be large.
    after = jnp.pad(decay, [(0, int(axis == T)) for axis in range(decay.ndim)])
    after = jax.lax.slice_in_dim(after, 1, None, axis=T)
    exponent = jnp.flip(jnp.cumsum(jnp.flip(after, T), T), T)
    exponent = exponent + _column(gate, exponent.ndim)
    move, restarts = whole, None
    if border is not None:
        exponent = jnp.where(_column(in_last, exponent.ndim), exponent, -jnp.inf)
        through = _of_lead(border.through, v)
        move = jnp.where(_column(through, whole.ndim), whole, -jnp.inf)
        restarts = jnp.where(_column(through, whole.ndim), -jnp.inf, whole)
    unit = None
    if normalize:
        unit = jnp.max(exponent, T)
        if restarts is not None:
            unit = jnp.maximum(unit, again.maximum + restarts)
        unit = jax.lax.stop_gradient(unit)
        exponent = exponent - jnp.expand_dims(unit, T)
        if restarts is not None:
            restarts = restarts + jax.lax.stop_gradient(again.maximum) - unit
    weighted = k * _column(jnp.exp(exponent), k.ndim)
    matrix = jnp.einsum("...thk,...thv->...hkv", weighted, v, precision=precision)
    normalizer = jnp.sum(weighted, T) if normalize else None
    if restarts is not None:
        factor = jnp.exp(restarts)
        matrix = matrix + _column(factor, matrix.ndim) * again.matrix
        if normalize:
            normalizer = normalizer + _column(factor, normalizer.ndim) * again.normalizer
    return move, NormalizedState(matrix, normalizer, unit)


def _delta_rule(parts, normalize, options, q, k, v, arrays):
    first, again, border = _prepare(normalize, q, v, arrays)
    hk, hv = q.shape[-1], v.shape[-1]
    begin, identity = jnp.zeros_like(again.matrix), jnp.eye(hk, dtype=again.matrix.dtype)
    identity = jnp.broadcast_to(identity, (*begin.shape[:-1], hk))
    none = jnp.zeros_like(identity)
    if border is not None:
        begin, identity = choose(
            _of_lead(border.continues, v), (begin, identity), (again.matrix, none)
        )
        arrays = arrays | {"segment_ids": border.ids}
    arrays = arrays | {"initial_state": jnp.concatenate([begin, identity], -1)}
    if "restart_state" in arrays:
        restart = arrays["restart_state"]
        zero = jnp.zeros((*restart.shape[:-1], hk), restart.dtype)
        arrays["restart_state"] = jnp.concatenate([restart, zero], -1)
    wider = jnp.concatenate([v, jnp.zeros((*v.shape[:-1], hk), v.dtype)], -1)
    out, end = linear_attention(q, k, wider, **arrays, **options)
    product = functools.partial(jnp.matmul, precision="highest")
    before, end = pass_states(
        first.matrix,
        end[..., hv:],
        end[..., :hv],
        parts=parts,
        after=lambda move, state, added: product(move, state) + added,
        join=product,
    )
    out = out.astype(before.dtype)
    precision = "highest" if v.dtype == before.dtype else None
    passed = jnp.einsum("...thk,...hkv->...thv", out[..., hv:], before, precision=precision)
    return (out[..., :hv] + passed).astype(v.dtype), end


def _prepare(normalize, q, v, arrays) -> tuple[NormalizedState, NormalizedState, Borders | None]:
    """The states that a row and that other documents start from, with all axes; and the borders."""
    wide = jnp.result_type(jnp.float32, q, v)
    *lead, T, heads, hv = v.shape
    axes = (*lead, heads)
    shapes = ((*axes, q.shape[-1], hv), (*axes, q.shape[-1]), axes)
    if not normalize:
        shapes = shapes[:1]

    def whole(state):
        if state is None:
            filled = [jnp.zeros(shape, wide) for shape in shapes]
        else:
            given = state if normalize else (state,)
            filled = [
                jnp.broadcast_to(x.astype(wide), s) for x, s in zip(given, shapes, strict=True)
            ]
        return NormalizedState(*filled) if normalize else NormalizedState(*filled, None, None)

    again = whole(arrays.get("restart_state"))
    first = arrays.get("initial_state")
    ids = arrays.get("segment_ids")
    border = None if ids is None else borders(ids, T)
    return again if first is None else whole(first), again, border


def _of_lead(x, v, more=0):
    """`x` with as many axes as v has leading ones, and `more`, matched with those from the left."""
    lead, rest = x.shape[: x.ndim - more], x.shape[x.ndim - more :]
    return x.reshape(*lead, *[1] * (v.ndim - 3 - len(lead)), *rest)


def _column(x, rank):
    """`x` with axes of size 1 at the end."""
    return x.reshape(*x.shape, *[1] * (rank - x.ndim))
