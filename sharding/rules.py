"""The one table from logical axes to mesh axes, and what follows from it.

Parameters, optimizer state, activations, batches and checkpoints are all sharded by `RULES`.
The mesh is the ambient one (`jax.set_mesh`); with none, or with one device, nothing is constrained.
"""

import math
from collections.abc import Mapping

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.settings import InputError, nearest

MeshAxes = tuple[str, ...]
Axes = tuple[str | None, ...]

RULES: Mapping[str, MeshAxes] = {
    # activations
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "chunk": ("sequence", "stream"),  # positions whose logits exist at once
    "blocks": ("data", "fsdp", "stream"),  # of a cache; a device has those of its rows and streams
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "slots": (),
    "rank": (),
    # both
    "streams": ("stream",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
}


def partition_spec(axes: Axes, name: str = "an array") -> PartitionSpec:
    """The partition of an array whose axes have these logical names (None: not sharded).

    Args:
      axes: a name of the table for each axis.
      name: what an error calls the array.

    Raises:
      ValueError: a name that is not in the table, or two axes that would lie on one mesh axis.
    """
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise ValueError(
                f"{name} has an axis {axis!r}, which is not in the table{nearest(axis, RULES)}; "
                f"it has {', '.join(RULES)}"
            )
    entries = [() if axis is None else RULES[axis] for axis in axes]
    used = [mesh_axis for entry in entries for mesh_axis in entry]
    for mesh_axis in used:
        both = [axis for axis in axes if axis is not None and mesh_axis in RULES[axis]]
        if len(both) > 1:
            raise ValueError(
                f"{name}: its axes {' and '.join(map(repr, both))} would both lie on mesh axis "
                f"{mesh_axis!r}; name one of them None, or give it a rule of its own"
            )
    return PartitionSpec(*(entry if len(entry) > 1 else (entry or (None,))[0] for entry in entries))


def check_divisible(name: str, shape: tuple[int, ...], axes: Axes, mesh: Mesh) -> None:
    """Raises InputError, naming the array, if a dimension does not divide over its mesh axes."""
    for size, axis in zip(shape, axes, strict=True):
        parts = 1
        for mesh_axis in () if axis is None else RULES[axis]:
            parts *= mesh.shape[mesh_axis]
        if size % parts:
            raise InputError(
                f"{name}: axis {axis!r} of size {size} does not divide over {parts} devices "
                f"(mesh axes {', '.join(RULES[axis])}); choose a mesh whose sizes divide it"
            )


def named_sharding(mesh: Mesh, *axes: str | None) -> NamedSharding:
    """The sharding of an array with these logical axes on `mesh`."""
    return NamedSharding(mesh, partition_spec(axes))


def is_sharded() -> bool:
    """Whether arrays here spread over more than one device: on a mesh, outside of `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and mesh.size > 1 and not mesh.are_all_axes_manual


def parts(axis: str) -> int:
    """How many parts a logical axis is in on the ambient mesh; 1 where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in RULES[axis]) if is_sharded() else 1


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out on the ambient mesh by its logical axes; `x` itself where there is no mesh."""
    if not is_sharded():
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes))
