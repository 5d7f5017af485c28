"""Linear attention on a mesh: each device takes its own rows, streams and heads."""

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.linear.api import check_arguments, linear_attention
from pallas_kernels.linear.options import NormalizedState

GATES = ("log_decay", "beta", "input_gate")
STATES = ("initial_state", "restart_state")


def sharded_linear_attention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    *,
    q_spec: PartitionSpec,
    v_spec: PartitionSpec,
    mesh: Mesh | None = None,
    **arguments,
) -> tuple[Float[Array, "*lead T H hv"], Array | NormalizedState]:
    """`linear_attention` in a `shard_map`: the compiler cannot divide a Pallas kernel without it.

    Args:
      q, k, v, arguments: as for `linear_attention`; gates and states are sharded as leading axes
        and heads of v, segment ids as leading axes.
      q_spec, v_spec: partition of q and k, and of v, one entry for each axis; leading axes and
        heads may be sharded, by the same number for both, positions and head dimensions not.
      mesh: with axes of type Auto; None: the ambient one (`jax.set_mesh`).

    Raises:
      ValueError: a spec that shards other axes, or q and v differently; or what
        `linear_attention` raises.
    """
    arrays = {name: arguments.pop(name, None) for name in (*GATES, "segment_ids", *STATES)}
    normalize = arguments.get("normalize", False)
    check_arguments(
        q, k, v, {name: arrays[name] for name in GATES}, normalize, arrays["segment_ids"],
        *(arrays[name] for name in STATES),
    )  # fmt: skip
    for name, spec, x in (("q_spec", q_spec, q), ("v_spec", v_spec, v)):
        if len(spec) != x.ndim or spec[-1] is not None or spec[-3] is not None:
            raise ValueError(
                f"{name}={spec}: expected {x.ndim} entries, those of positions and head dimension "
                "None; sequences over devices are the matter of `sharding`"
            )
    if q_spec != v_spec:
        raise ValueError(
            f"q_spec={q_spec}, v_spec={v_spec}: expected the same entries, or a device's values "
            "would need keys of another"
        )
    lead, heads = v_spec[:-3], v_spec[-2]

    def of_state(state):
        # It may lack all but the last of the leading axes.
        matrix = state[0] if isinstance(state, tuple) else state
        axes = lead if matrix.ndim == v.ndim else lead[-1:]
        return jax.tree.map(lambda _: PartitionSpec(*axes, heads), state)

    ids = arrays["segment_ids"]
    specs = {name: PartitionSpec(*lead, None, heads) for name in GATES}
    specs["segment_ids"] = None if ids is None else PartitionSpec(*lead[: ids.ndim - 1])
    specs |= {name: of_state(arrays[name]) for name in STATES if arrays[name] is not None}
    arrays = {name: x for name, x in arrays.items() if x is not None}
    specs = {name: specs[name] for name in arrays}
    end = PartitionSpec(*lead, heads)
    return jax.shard_map(
        lambda q, k, v, arrays: linear_attention(q, k, v, **arrays, **arguments),
        mesh=mesh,
        in_specs=(q_spec, q_spec, v_spec, specs),
        out_specs=(v_spec, NormalizedState(end, end, end) if normalize else end),
        check_vma=False,
    )(q, k, v, arrays)
