"""Many compilations for a pod: the largest batch that fits, and meshes ranked by their bound.

Each compilation has a process of its own: libtpu keeps memory of every program it compiled.
"""

import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

from parscale.config import Config
from sharding.mesh import MeshConfig
from sharding.pods.compilation import DoesNotFitError
from sharding.pods.topologies import Topology
from sharding.settings import InputError


def apart(function: Callable, *arguments):
    """What a function returns or raises in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(function, *arguments).result()


class Fit(NamedTuple):
    """The largest that fits, and the least that was found not to; None: none was."""

    fits: int | None
    too_large: int | None


def largest_that_fits(fits: Callable[[int], bool], first: int = 1, limit: int = 2**16) -> Fit:
    """The largest number for which `fits` is true, by doubling and then by bisection.

    Args:
      fits: true up to some number and false from there on.
      first: the least to try, of which all that is tried is a multiple.
      limit: the largest multiple to try.
    """
    low, high = 0, 1
    while fits(first * high):
        low, high = high, 2 * high
        if high > limit:
            return Fit(first * low, None)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(first * middle) else (low, middle)
    return Fit(first * low if low else None, first * high)


def divisions(config: MeshConfig, axes: Sequence[str], devices: int) -> Iterator[MeshConfig]:
    """Every mesh whose named axes take the devices that the other axes leave.

    Raises:
      InputError: the other axes do not divide the devices.
    """
    fixed = {name: size for name, size in sizes_of(config).items() if name not in axes}
    if -1 in fixed.values():
        name = next(name for name, size in fixed.items() if size == -1)
        raise InputError(f"mesh.{name}=-1: an axis that is not searched needs a size")
    rest, remainder = divmod(devices, math.prod(fixed.values()))
    if remainder:
        raise InputError(
            f"mesh {config.describe()}: the axes that are not searched take "
            f"{math.prod(fixed.values())} devices, which does not divide the {devices} there are"
        )
    sizes = [size for size in range(1, rest + 1) if rest % size == 0]
    for found in itertools.product(sizes, repeat=len(axes)):
        if math.prod(found) == rest:
            yield dataclasses.replace(config, **fixed, **dict(zip(axes, found, strict=True)))


def sizes_of(config: MeshConfig) -> dict[str, int]:
    """The size of each axis, by its name."""
    from sharding.mesh import AXES

    return {axis: getattr(config, axis) for axis in AXES}


def why_not(config: Config, topology: Topology) -> str:
    """Why a mesh cannot be, without compiling: what does not divide; "" if it can."""
    sizes = sizes_of(config.mesh)
    model = config.model
    divided = {
        "data.batch": (config.data.batch // config.train.accumulate, ("data", "fsdp")),
        "model.streams": (model.streams, ("stream",)),
        "data.length": (config.data.length, ("sequence",)),
        "model.width": (model.width, ("fsdp",)),
        "model.heads": (model.heads, ("tensor",)),
        "model.kv_heads": (model.kv_heads, ("tensor",)),
        "model.mlp_width": (model.mlp_width, ("tensor",)),
        "model.vocab_size": (model.vocab_size, ("tensor",)),
        "data": (sizes["data"], topology.slices),
    }
    for name, (size, axes) in divided.items():
        parts = axes if isinstance(axes, int) else math.prod(sizes[axis] for axis in axes)
        if size % parts:
            return f"{name}={size} does not divide over {parts}"
    if sizes["expert"] > 1:
        return "there are no experts to divide"
    return ""


def outcome(config: Config, topology: Topology, decode=None):
    """The step of `pod_step.compile_step`, or in a word why there is none."""
    from parscale.pod_step import compile_step

    try:
        return compile_step(config, topology, decode)
    except (InputError, DoesNotFitError) as error:
        return error
