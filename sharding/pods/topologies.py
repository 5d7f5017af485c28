"""TPU slices by the names people and the compiler give them, and their devices without any TPU.

`v5e:16x16` is how the compiler names a slice; `v5litepod-256`, `v5e-256` or `v5p-128` is how people
do, who count TensorCores of v4, v5p and tpu7x (two on a chip), and chips of the others.
`2xv5e:16x16` is two slices, joined by the data-centre network.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import typing

from sharding.settings import InputError, nearest

if typing.TYPE_CHECKING:
    import jax

# Without these libtpu asks a cloud for its metadata and complains of what it does not find, refuses
# to be loaded by two processes, and writes a log of up to 100 MB for every kernel that it compiles.
# The slice it is told of is not the one to compile for.
LIBTPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
}

PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16",
    "8x16x16", "16x16x16",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """TPUs of one kind.

    Attributes:
      chip: its name in `v5e:16x16`, and in a table of chips.
      names: what people write before the number.
      shapes: of its slices, one for each number of chips.
      counted: what people count on each chip: TensorCores, or chips.
      settings: what the compiler has to be told of it beside its name.
      devices: that each chip is to the compiler.
    """

    chip: str
    names: tuple[str, ...]
    shapes: tuple[str, ...]
    counted: int = 1
    settings: tuple[tuple[str, str], ...] = ()
    devices: int = 1


FAMILIES = (
    # Two cores as one device, without which no mesh can be laid on the torus.
    Family("v4", ("v4",), CUBES, 2, (("chip_config_name", "megacore"),)),
    Family("v5e", ("v5litepod", "v5e"), PLANES),
    Family("v5p", ("v5p",), CUBES, 2),
    Family("v6e", ("v6e",), PLANES),
    Family("tpu7x", ("tpu7x",), CUBES, 2, devices=2),
)


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices of TPUs.

    Attributes:
      chip: v4, v5e, v5p, v6e or tpu7x.
      shape: chips along each axis of a slice's torus, such as (16, 16).
      slices: how many of them.
    """

    chip: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def chips(self) -> int:
        """In all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def device_count(self) -> int:
        """Devices in all slices: chips, but on tpu7x each of the two halves of one."""
        return self.chips * self._family.devices

    @property
    def _family(self) -> Family:
        return next(family for family in FAMILIES if family.chip == self.chip)

    def __str__(self) -> str:
        name = f"{self.chip}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices}x{name}"

    def devices(self) -> list[jax.Device]:
        """Descriptions of its devices (of tpu7x two on a chip), to compile for.

        Raises:
          InputError: libtpu is not installed, or does not know such a slice.
        """
        os.environ.update(LIBTPU | os.environ)
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise InputError(
                "compiling for a TPU needs libtpu, which is not installed: pip install libtpu"
            ) from None
        from jax.experimental import topologies

        family = self._family
        name = str(dataclasses.replace(self, slices=1))
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=name, num_slices=self.slices, **dict(family.settings)
            )
        except Exception as error:
            reason = str(error).splitlines()[0]
            raise InputError(
                f"topology {self}: the compiler does not take it ({reason}); "
                f"slices of {self.chip} are {', '.join(family.shapes)}"
            ) from None
        return found.devices


def known_names() -> list[str]:
    """The slices that have a name of people's, by it."""
    return [
        f"{family.names[0]}-{family.counted * _chips(shape)}"
        for family in FAMILIES
        for shape in family.shapes
    ]


def parse_topology(text: str) -> Topology:
    """The topology of a name such as `v5e:16x16`, `v5litepod-256` or `2xv5p-128`.

    Raises:
      InputError: no such slice.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)(?::(\d+(?:x\d+)*)|-(\d+))", text.strip().lower())
    family = found and next((family for family in FAMILIES if found[2] in family.names), None)
    if not family or found[1] == "0":
        raise InputError(f"topology={text}: no such slice{_guess(text)}; expected {_expected()}")
    slices, shape, number = int(found[1] or 1), found[3], found[4]
    if number is not None:
        by_count = {family.counted * _chips(shape): shape for shape in family.shapes}
        if int(number) not in by_count:
            counts = "TensorCores, two on a chip" if family.counted == 2 else "chips"
            raise InputError(
                f"topology={text}: no slice of {family.chip} has that number; expected one of "
                f"{', '.join(map(str, by_count))} ({counts}), or a shape as in "
                f"{family.chip}:{family.shapes[-1]}"
            )
        shape = by_count[int(number)]
    sizes = tuple(map(int, shape.split("x")))
    dimensions = family.shapes[0].count("x") + 1
    if len(sizes) != dimensions or 0 in sizes:
        raise InputError(
            f"topology={text}: slices of {family.chip} have {dimensions} dimensions, "
            f"such as {family.chip}:{family.shapes[-1]}"
        )
    return Topology(family.chip, sizes, slices)


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _guess(text: str) -> str:
    shapes = [f"{family.chip}:{shape}" for family in FAMILIES for shape in family.shapes]
    return nearest(text.lower(), known_names() + shapes)


def _expected() -> str:
    ranges = []
    for family in FAMILIES:
        counts = [family.counted * _chips(shape) for shape in family.shapes]
        names = " or ".join(f"{name}-{counts[0]} to -{counts[-1]}" for name in family.names)
        ranges.append(f"{names} ({family.chip}:{family.shapes[0]} to {family.shapes[-1]})")
    return "; ".join(ranges) + "; before it 2x for two slices"
