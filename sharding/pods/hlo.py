"""What a compiled program computes and communicates, read from XLA's text of it.

XLA's own cost analysis counts the body of a loop once, and the text says how often it runs. Counted
are the matrix products (elementwise work is not), the bytes of every collective, and the cycles
that the TPU compiler estimates for each fusion. A Pallas kernel is opaque: its products are in none
of the figures. Of a condition all branches are counted, of which at most one runs.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping

import numpy as np

from sharding.pods import hlo_groups
from sharding.pods.hlo_loops import trip_count
from sharding.pods.hlo_text import Computation, Instruction, Shape, parse

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
NO_ESTIMATE = 2**63 - 1
"""Cycles of what the TPU compiler cannot estimate, such as work of the chip's other cores."""

KERNELS = ("tpu_custom_call", "mosaic_gpu")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over the same mesh axes, in one run of the program.

    Attributes:
      kind: such as "all-gather"; "host-transfer" between slices.
      axes: mesh axes along which the devices of a group differ; () between slices.
      size: devices in a group.
      count: how many a device takes part in.
      bytes: of their results, on each device (of a host transfer: of what the device sends).
    """

    kind: str
    axes: tuple[str, ...]
    size: int
    count: int
    bytes: int

    @property
    def is_dcn(self) -> bool:
        """Whether it goes through the hosts, between slices."""
        return self.kind == "host-transfer"

    @property
    def traffic(self) -> float:
        """Bytes that a device must receive, at the least, with an algorithm as good as a ring."""
        share = (self.size - 1) / self.size
        return self.bytes * {
            "all-gather": share,
            "all-to-all": share,
            "ragged-all-to-all": share,
            "all-reduce": 2 * share,
            "reduce-scatter": self.size - 1,
        }.get(self.kind, 1)


@dataclasses.dataclass(frozen=True)
class Work:
    """What one run of a program does on each device.

    Attributes:
      flops: multiplications and additions of matrix products and convolutions outside of kernels.
      collectives: by kind and axes, the largest first.
      cycles: the TPU compiler's estimate for all but kernels; 0 on other platforms.
      kernels: runs of Pallas kernels.
      unknown_loops: names of loops whose length the text does not tell; counted as run once.
    """

    flops: int
    collectives: tuple[Collective, ...]
    cycles: int
    kernels: int
    unknown_loops: tuple[str, ...]

    def bytes_over(self, *axes: str, kind: str | None = None) -> int:
        """Result bytes of the collectives over any of these mesh axes."""
        return sum(
            found.bytes
            for found in self.collectives
            if set(axes) & set(found.axes) and kind in (None, found.kind)
        )

    def count_over(self, *axes: str, kind: str | None = None) -> int:
        """How many collectives go over any of these mesh axes."""
        return sum(
            found.count
            for found in self.collectives
            if set(axes) & set(found.axes) and kind in (None, found.kind)
        )


def read(text: str, mesh_shape: Mapping[str, int], slices: int = 1) -> Work:
    """The work of a compiled program.

    Args:
      text: `Compiled.as_text()`.
      mesh_shape: size of each mesh axis, outer to inner.
      slices: of the topology; groups of devices are then numbered within a slice, which has its
        part of the first axis.

    Raises:
      ValueError: the text is not that of a compiled program, or has groups of unknown form.
    """
    entry, computations = parse(text)
    first, *_ = mesh_shape
    shape = dict(mesh_shape) | {first: mesh_shape[first] // slices}
    reader = _Reader(computations, shape)
    reader.walk(computations[entry], 1)
    return reader.work()


class _Reader:
    def __init__(self, computations: dict[str, Computation], shape: dict[str, int]):
        self.computations = computations
        self.shape = shape
        self.flops = self.cycles = self.kernels = 0
        self.totals = collections.defaultdict(lambda: [0, 0])
        self.unknown: list[str] = []

    def work(self) -> Work:
        found = [Collective(*key, *total) for key, total in self.totals.items()]
        ordered = sorted(found, key=lambda one: (-one.bytes, one.kind, one.axes))
        return Work(self.flops, tuple(ordered), self.cycles, self.kernels, tuple(self.unknown))

    def walk(self, computation: Computation, times: int, fusion: Instruction | None = None) -> None:
        """Adds what `times` runs of a computation do; `fusion` is what calls it, if it is fused."""
        for found in computation.values():
            if fusion is None:
                estimate = re.search(r'"estimated_cycles":"(\d+)"', found.attributes)
                if estimate and int(estimate[1]) != NO_ESTIMATE:
                    self.cycles += times * int(estimate[1])
            if found.opcode == "while":
                self._loop(found, computation, times)
            elif found.opcode == "fusion":
                for name in found.called("calls"):
                    self.walk(self.computations[name], times, found)
            elif found.opcode in ("call", "conditional", "async-start"):
                inner = found.called(
                    "to_apply", "calls", "called_computations", "branch_computations",
                    "true_computation", "false_computation",
                )  # fmt: skip
                for name in inner:
                    self.walk(self.computations[name], times, fusion)
            elif found.opcode == "dot":
                self.flops += times * dot_flops(found, computation)
            elif found.opcode == "convolution":
                self.flops += times * convolution_flops(found, computation)
            elif found.opcode == "custom-call":
                target = found.attribute("custom_call_target").strip('"')
                self.kernels += times if target in KERNELS else 0
                # Collectives that the TPU's other cores carry out.
                for name in found.called("called_computations"):
                    self.walk(self.computations[name], times, fusion)
            elif found.opcode == "send":
                self._send(found, times)
            elif found.opcode.removesuffix("-start") in KINDS:
                self._collective(found, computation, times, fusion)

    def _loop(self, loop: Instruction, caller: Computation, times: int) -> None:
        runs = trip_count(loop, caller, self.computations)
        if runs is None:
            self.unknown.append(loop.name)
            runs = 1
        for name in loop.called("body", "condition"):
            self.walk(self.computations[name], times * runs)

    def _send(self, found: Instruction, times: int) -> None:
        if found.attribute("is_host_transfer") == "true":
            self._add(("host-transfer", (), 2), times, sum(s.bytes for s in found.parts()[0]))

    def _collective(self, found, computation, times, fusion) -> None:
        # The TPU compiler spreads one collective over several fusions, the first of which starts it
        # and all of which repeat it.
        if "chain_id=" in found.attributes and not _starts(computation):
            return
        kind = found.opcode.removesuffix("-start")
        shapes = found.shapes
        if found.opcode in ("all-gather-start", "collective-permute-start"):
            shapes = found.parts()[1]
        if kind == "collective-permute":
            pairs = hlo_groups.pairs(found.attribute("source_target_pairs"))
            axes, size = hlo_groups.axes_of(pairs, self.shape), 2
        else:
            devices = math.prod(self.shape.values())
            groups = hlo_groups.groups(_groups_text(found), devices)
            axes, size = hlo_groups.axes_of(groups, self.shape), groups.shape[1]
        # How the TPU compiler writes a reduce-scatter: the sum, of which the fusion keeps a part.
        if fusion is not None and computation.name.startswith("all-reduce-scatter"):
            kind, shapes = "reduce-scatter", fusion.shapes
        if size > 1 and axes:
            self._add((kind, axes, size), times, sum(shape.bytes for shape in shapes))

    def _add(self, key: tuple, times: int, size: int) -> None:
        self.totals[key][0] += times
        self.totals[key][1] += times * size


def _starts(computation: Computation) -> bool:
    return any("AsyncCollectiveStart" in found.attributes for found in computation.values())


def _groups_text(found: Instruction) -> str:
    """All of the attribute, which has spaces and, with a list of devices, a comma in it."""
    match = re.search(
        r"replica_groups=(mesh\[.*?\](?:,\s*device_ids=\(.*?\)+)?\s*\{.*?\})", found.attributes
    )
    return match[1] if match else found.attribute("replica_groups")


def dot_flops(dot: Instruction, computation: Computation) -> int:
    """Multiplications and additions of a matrix product."""
    left = computation[dot.inputs[0]].shapes[0]
    contracted = re.findall(r"\d+", dot.attribute("lhs_contracting_dims"))
    depth = math.prod(left.dims[int(axis)] for axis in contracted)
    return 2 * depth * math.prod(dot.shapes[0].dims)


def convolution_flops(convolution: Instruction, computation: Computation) -> int:
    """Multiplications and additions of a convolution, without those with padding and holes.

    That is how the TPU compiler writes matrix products, batched ones too.
    """
    data, kernel, out = (
        computation[convolution.inputs[0]].shapes[0],
        computation[convolution.inputs[1]].shapes[0],
        convolution.shapes[0],
    )
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", convolution.attribute("dim_labels"))
    window = _window(convolution.attribute("window"))
    groups = int(convolution.attribute("batch_group_count") or 1)
    macs = _size(data, labels[1], "b") // groups
    macs *= _size(kernel, labels[2], "i") * _size(kernel, labels[2], "o")
    for place, sizes in enumerate(window):
        axis = str(place)
        macs *= _valid(
            _size(data, labels[1], axis), _size(kernel, labels[2], axis),
            _size(out, labels[3], axis), sizes,
        )  # fmt: skip
    return 2 * macs


def _size(shape: Shape, labels: str, label: str) -> int:
    return shape.dims[labels.index(label)]


def _window(text: str) -> list[dict[str, int]]:
    """Stride, low padding and dilations of each spatial axis."""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", text))
    axes = len(fields["size"].split("x")) if "size" in fields else 0

    def numbers(name: str, default: int) -> list[int]:
        words = fields[name].split("x") if name in fields else [str(default)] * axes
        return [int(word.split("_")[0]) for word in words]

    names = {"stride": 1, "pad": 0, "lhs_dilate": 1, "rhs_dilate": 1}
    columns = [numbers(name, default) for name, default in names.items()]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _valid(data: int, kernel: int, out: int, window: dict[str, int]) -> int:
    """Pairs of a place in the result and one in the kernel that meet an item of the data."""
    place = np.arange(out)[:, None] * window["stride"] - window["pad"]
    place = place + np.arange(kernel) * window["rhs_dilate"]
    dilated = (data - 1) * window["lhs_dilate"] + 1
    inside = (place >= 0) & (place < dilated) & (place % window["lhs_dilate"] == 0)
    return int(inside.sum())
