"""Aaren whose positions lie over the mesh axis `sequence`, in consecutive parts.

A device's part of a row, as a part of a softmax, is one score, one sum and one value for each head;
these travel (`sharding.sequence.state`), and merge as any parts do.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pallas_kernels.linear.aaren import AarenState, aaren, merge_parts
from sharding import sequence
from sharding.sequence.state import borders, choose, pass_states


def sequence_aaren(
    q: Float[Array, "H h"],
    k: Float[Array, "B P T H h"],
    v: Float[Array, "B P T H hv"],
    *,
    spec: PartitionSpec,
    segment_ids: Int[Array, "B T"] | None = None,
    restart_state: AarenState | None = None,
) -> tuple[Float[Array, "B P T H hv"], AarenState]:
    """`aaren` on the ambient mesh, by the ambient scheme.

    Args:
      q, k, v, segment_ids, restart_state: as for `aaren`, the last with axis P alone.
      spec: partition of k and v, one entry for each axis: that of positions `sequence`, that of
        head dimensions None.

    Raises:
      InputError: positions do not divide over the axis.
    """
    parts = jax.sharding.get_abstract_mesh().shape[sequence.AXIS]
    sequence.check_length(k.shape[-3], parts)
    batch, streams, _, heads, _ = spec
    state = lambda *axes: AarenState(*(PartitionSpec(*axes, heads),) * 3)
    return jax.shard_map(
        functools.partial(_parts, parts),
        in_specs=(
            PartitionSpec(heads),
            spec,
            spec,
            None if segment_ids is None else PartitionSpec(batch),
            None if restart_state is None else state(streams),
        ),
        out_specs=(spec, state(batch, streams)),
        check_vma=False,
    )(q, k, v, segment_ids, restart_state)


def _parts(parts, q, k, v, segment_ids, restart_state):
    (B, P, T, H, hv), wide = v.shape, jnp.result_type(jnp.float32, q, k, v)
    nothing = AarenState(
        jnp.full((B, P, H), -jnp.inf, wide),
        jnp.zeros((B, P, H), wide),
        jnp.zeros((B, P, H, hv), wide),
    )
    again = nothing
    if restart_state is not None:
        again = jax.tree.map(lambda x, y: jnp.broadcast_to(x.astype(wide), y.shape),
                             restart_state, nothing)  # fmt: skip
    border = None if segment_ids is None else borders(segment_ids, T)
    through = jnp.ones(B, bool) if border is None else border.through
    added = _summary(q, k, v, border)
    if restart_state is not None and border is not None:
        added = merge_parts(choose(through, nothing, again), added)
    before, end = pass_states(
        again,
        through,
        added,
        parts=parts,
        after=lambda move, state, added: merge_parts(choose(move, state, nothing), added),
        join=jnp.logical_and,
    )
    if border is not None:
        before = choose(border.continues, before, again)
        segment_ids = border.ids
    out, _ = aaren(
        q, k, v, segment_ids=segment_ids, initial_state=before, restart_state=restart_state
    )
    return out, end


def _summary(q, k, v, border) -> AarenState:
    """The last document of a part, as far as it lies in it."""
    wide = jnp.result_type(jnp.float32, q, k, v)
    if border is not None:
        seen = (border.in_last & (border.ids != 0))[:, None, :, None]
        k, v = (jnp.where(seen[..., None], x, 0) for x in (k, v))
    scores = q.shape[-1] ** -0.5 * jnp.sum(k.astype(wide) * q.astype(wide), -1)
    if border is not None:
        scores = jnp.where(seen, scores, -jnp.inf)
    # As in `aaren`, a constant: the unit in which the sums are held.
    maximum = jax.lax.stop_gradient(jnp.max(scores, 2))
    unit = jnp.where(maximum > -jnp.inf, maximum, 0.0)
    weights = jnp.exp(scores - unit[:, :, None])
    weighted = jnp.einsum("bpth,bpthv->bphv", weights, v.astype(wide), precision="highest")
    return AarenState(maximum, jnp.sum(weights, 2), weighted)
