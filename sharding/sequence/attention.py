"""Attention whose positions lie over the mesh axis `sequence`, in consecutive parts.

- "gather": every device gathers all keys and values, and its queries stay.
- "heads": every device takes all positions of some of the heads (arXiv 2309.14509).
- "ring": keys and values go around (`sharding.sequence.ring`).
"""

import functools

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from pallas_kernels import attention
from pallas_kernels.flash.api import check_arguments
from pallas_kernels.masks import Mask
from sharding import sequence
from sharding.sequence import masks as sequence_masks
from sharding.sequence.ring import ring_attention


def sequence_attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead T K h"],
    v: Float[Array, "*lead T K h"],
    mask: Mask,
    *,
    q_spec: PartitionSpec,
    kv_spec: PartitionSpec,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None = None,
    **options,
) -> Float[Array, "*lead T H h"]:
    """`pallas_kernels.attention` on the ambient mesh, by the ambient scheme.

    Args:
      q, k, v, mask, prefix: as for `attention`, with as many keys as queries; the mask's leading
        axes are sharded as those of q, the prefix as the streams and the heads of k.
      q_spec, kv_spec: partition of q and of k and v, one entry for each axis: that of positions
        `sequence`, and the same one or None for the heads of both.
      options: `scale`, `soft_cap` and `implementation`, as for `attention`.

    Raises:
      InputError: positions do not divide over the axis, or heads or positions not as the chosen
        scheme needs it.
      ValueError: what `attention` raises.
    """
    check_arguments(q, k, v, mask, prefix)
    mesh = jax.sharding.get_abstract_mesh()
    parts = mesh.shape[sequence.AXIS]
    *lead, _, heads, _ = q_spec
    tensor = _devices(mesh, heads)
    gathered = sequence.gathered_bytes(k.shape, k.dtype.itemsize, tensor * _devices(mesh, *lead))
    scheme = sequence.attention_scheme(
        parts, tensor, q.shape[-2], k.shape[-2], q.shape[-3], gathered
    )

    def of_mask(intervals):
        axes = intervals.shape[:-3]
        return PartitionSpec(*(None if n == 1 else a for n, a in zip(axes, lead, strict=False)))

    of_prefix = None
    if prefix is not None:
        heads = (*_names(kv_spec[-2]), *([sequence.AXIS] if scheme == "heads" else []))
        of_prefix = (PartitionSpec(lead[-1], heads or None),) * 2
    run = {"gather": _gather, "heads": _heads, "ring": ring_attention}[scheme]
    return jax.shard_map(
        functools.partial(run, parts, options),
        in_specs=(q_spec, kv_spec, kv_spec, jax.tree.map(of_mask, mask), of_prefix),
        out_specs=q_spec,
        check_vma=False,
    )(q, k, v, mask, prefix)


def _gather(parts, options, q, k, v, mask, prefix):
    queries, axis = q.shape[-3], q.ndim - 3
    first_query = jax.lax.axis_index(sequence.AXIS) * queries
    k, v = (jax.lax.all_gather(x, sequence.AXIS, axis=axis, tiled=True) for x in (k, v))
    mask, k, v = sequence_masks.part(mask, queries, first_query, k, v, 0)
    return attention(q, k, v, mask, prefix=prefix, **options)


def _heads(parts, options, q, k, v, mask, prefix):
    positions, heads = q.ndim - 3, q.ndim - 2
    exchange = functools.partial(jax.lax.all_to_all, axis_name=sequence.AXIS, tiled=True)
    q, k, v = (exchange(x, split_axis=heads, concat_axis=positions) for x in (q, k, v))
    out = attention(q, k, v, mask, prefix=prefix, **options)
    return exchange(out, split_axis=positions, concat_axis=heads)


def _names(entry) -> tuple[str, ...]:
    """The mesh axes of an entry of a PartitionSpec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _devices(mesh, *entries) -> int:
    """Over how many devices these entries of a PartitionSpec lie."""
    count = 1
    for entry in entries:
        for name in _names(entry):
            count *= mesh.shape[name]
    return count
