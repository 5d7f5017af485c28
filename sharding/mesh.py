"""The device mesh: six named axes, all always present, size 1 when unused."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Sequence

from sharding.settings import InputError, check_choices, option

# The configuration of a run is read without jax, which takes a second to import.
if typing.TYPE_CHECKING:
    import jax
    from jax.sharding import Mesh

AXES = ("data", "fsdp", "stream", "expert", "sequence", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis, outer to inner. One axis may be -1: what the others leave."""

    data: int = option(
        -1, "copies of the parameters, each with its part of the batch", resume="free"
    )
    fsdp: int = option(1, "parts of the parameters, each with its part of the batch", resume="free")
    stream: int = option(1, "parts of the P streams", resume="free")
    expert: int = option(1, "parts of the experts (of a mixture-of-experts layer)", resume="free")
    sequence: int = option(1, "parts of the sequence", resume="free")
    tensor: int = option(1, "parts of heads and MLP width", resume="free")
    sequence_attention: str = option(
        "auto",
        "how attention sees the other parts of the sequence: gather (their keys and values), "
        "heads (all positions of some heads), ring (keys and values go around), auto (by sizes)",
        resume="free",
        choices=("auto", "gather", "heads", "ring"),
    )
    sequence_state: str = option(
        "auto",
        "how a recurrence gets the state before its part of the sequence: gather (all states), "
        "steps (log2 of the parts, each of one state), auto (gather up to 8 parts)",
        resume="free",
        choices=("auto", "gather", "steps"),
    )

    def __post_init__(self):
        check_choices(self)
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes):
            raise InputError(f"mesh {self.describe()}: each axis is at least 1, or -1 for the rest")
        if sizes.count(-1) > 1:
            raise InputError(f"mesh {self.describe()}: only one axis may be -1")

    def describe(self) -> str:
        """`data=2 x fsdp=4 x ...`, the axes of size 1 left out."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        return " x ".join(f"{axis}={n}" for axis, n in sizes.items() if n != 1) or "data=1"


def mesh_shape(config: MeshConfig, devices: int) -> tuple[int, ...]:
    """Sizes of the six axes for a number of devices.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        if devices % known:
            raise InputError(
                f"mesh {config.describe()}: the fixed axes take {known} devices, "
                f"which does not divide the {devices} there are: change a size"
            )
        sizes[sizes.index(-1)] = devices // known
    elif known != devices:
        raise InputError(
            f"mesh {config.describe()} takes {known} devices, but there are {devices}: "
            "change a size, or give one axis -1 for what is left"
        )
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (all of the run's by default), every axis of Auto type.

    Raises:
      InputError: the sizes do not multiply to the number of devices.
    """
    import jax
    import numpy as np
    from jax.sharding import AxisType, Mesh

    devices = list(jax.devices() if devices is None else devices)
    shape = mesh_shape(config, len(devices))
    if devices[0].platform == "tpu":
        grid = _tpu_grid(config, shape, devices)
    else:
        grid = np.asarray(devices).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _tpu_grid(config: MeshConfig, shape: tuple[int, ...], devices: Sequence[jax.Device]):
    """The devices laid out so that neighbours on an axis are neighbours in their torus."""
    from jax.experimental import mesh_utils

    # Physical axes are split because those of v5e and v6e are only two, of 16 chips.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    data, *rest = shape
    if data % slices:
        raise InputError(
            f"mesh {config.describe()}: data={data} is not a multiple of the {slices} slices, "
            "which only the data axis crosses"
        )
    return mesh_utils.create_hybrid_device_mesh(
        (data // slices, *rest),
        (slices, *(1 for _ in rest)),
        devices,
        allow_split_physical_axes=True,
    )
