"""Attention on a mesh: each device takes its own rows, streams and heads, without communication."""

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels.flash.api import attention, check_arguments
from pallas_kernels.masks import Mask


def sharded_attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    mask: Mask,
    *,
    q_spec: PartitionSpec,
    kv_spec: PartitionSpec,
    mesh: Mesh | None = None,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None = None,
    **options,
):
    """`attention` in a `shard_map`, which the compiler cannot divide a Pallas kernel without.

    Args:
      q, k, v, mask, prefix, options: as for `attention`; the mask's leading axes are sharded as
        those of q, the prefix as the streams and the heads of k.
      q_spec, kv_spec: partition of q and of k and v, one entry for each axis; leading axes and
        heads may be sharded, by the same number for q and k, positions and head dimension not.
      mesh: with axes of type Auto; None: the ambient one (`jax.set_mesh`).

    Raises:
      ValueError: a spec that shards other axes, or heads of q and of k differently; or what
        `attention` raises.
    """
    check_arguments(q, k, v, mask, prefix)
    for name, spec, x in (("q_spec", q_spec, q), ("kv_spec", kv_spec, k)):
        if len(spec) != x.ndim or spec[-1] is not None or spec[-3] is not None:
            raise ValueError(
                f"{name}={spec}: expected {x.ndim} entries, those of positions and head dimension "
                "None; sequences over devices are the matter of `sharding`"
            )
    if q_spec[-2] != kv_spec[-2] or q_spec[:-3] != kv_spec[:-3]:
        raise ValueError(
            f"q_spec={q_spec}, kv_spec={kv_spec}: expected the same entries for leading axes and "
            "heads, or a device's query heads would need keys of another"
        )
    lead = q_spec[:-3]

    def of_mask(intervals):
        axes = intervals.shape[:-3]
        return PartitionSpec(*(None if n == 1 else a for n, a in zip(axes, lead, strict=False)))

    specs = (q_spec, kv_spec, kv_spec, jax.tree.map(of_mask, mask))
    of_prefix = None if prefix is None else (PartitionSpec(lead[-1], kv_spec[-2]),) * 2
    of_lse = PartitionSpec(*q_spec[:-1])
    return jax.shard_map(
        lambda q, k, v, mask, prefix: attention(q, k, v, mask, prefix=prefix, **options),
        mesh=mesh,
        in_specs=(*specs, of_prefix),
        out_specs=(q_spec, of_lse) if options.get("return_lse") else q_spec,
        check_vma=False,
    )(q, k, v, mask, prefix)
