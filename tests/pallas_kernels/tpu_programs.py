"""Programs of attention, softmax and linear, compiled for TPUs that need not be there.

In a process of their own: once libtpu is loaded, jax's profiler crashes where there is no TPU.
"""

import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from typing import NamedTuple

import jax

from sharding.pods import topologies

TOPOLOGIES = {
    "v4": ("v4:2x2x1", {"chip_config_name": "megacore"}),
    "v5e": ("v5e:2x2", {}),
    "v5p": ("v5p:2x2x1", {}),
    "v6e": ("v6e:2x2", {}),
    "tpu7x": ("tpu7x:2x2x1", {}),
}


class Program(NamedTuple):
    """Kernels of a program, matrix products outside them, and bytes of temporary memory."""

    kernels: int
    products: int
    temporary: int


def process() -> ProcessPoolExecutor:
    """Where to submit `compiled`."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare)


def _prepare():
    os.environ.update(topologies.LIBTPU)


def compiled(target, mask, arrays, soft_cap, blocks) -> list[Program]:
    """The forward and the backward program, for arrays of such shapes."""
    from pallas_kernels import dispatch
    from pallas_kernels.flash import tpu
    from pallas_kernels.flash.options import Options

    mask, (q, k, v, prefix, dout, dlse) = _on(_chip(target), (mask, arrays))
    options = Options(q.shape[-1] ** -0.5, soft_cap)

    def forward(q, k, v, mask, prefix):
        return tpu.forward(options, q, k, v, mask, prefix, blocks=blocks)

    def backward(q, k, v, mask, prefix, out, lse, dout, dlse):
        return tpu.backward(options, q, k, v, mask, prefix, out, lse, dout, dlse, blocks=blocks)

    with dispatch.compiling_for("tpu"):
        programs = (
            jax.jit(forward).lower(q, k, v, mask, prefix).compile(),
            jax.jit(backward).lower(q, k, v, mask, prefix, q, dlse, dout, dlse).compile(),
        )
    return [_facts(program) for program in programs]


def compiled_linear(target, options, inputs, implementation="tpu") -> list[Program]:
    """The forward and the backward program of linear attention, for `Inputs` of such shapes.

    Args:
      implementation: "tpu" or "xla".
    """
    import importlib

    from pallas_kernels import dispatch

    module = importlib.import_module(f"pallas_kernels.linear.{implementation}")

    def forward(inputs):
        return module.forward(options, inputs, save=True)

    def backward(*arguments):
        return module.backward(options, *arguments)

    chip = _chip(target)
    inputs = _on(chip, inputs)
    with dispatch.compiling_for("tpu"):
        out, end, starts = _on(chip, jax.eval_shape(forward, inputs))
        programs = (
            jax.jit(forward).lower(inputs).compile(),
            jax.jit(backward).lower(inputs, out, starts, out, end).compile(),
        )
    return [_facts(program) for program in programs]


def _chip(target):
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    name, settings = TOPOLOGIES[target]
    topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **settings)
    return SingleDeviceSharding(topology.devices[0])


def _on(chip, arrays):
    """Structures of arrays that are on a chip."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arrays)


def _facts(program) -> Program:
    text = program.as_text()
    return Program(
        len(re.findall(r'custom_call_target="tpu_custom_call"', text)),
        len(re.findall(r"= \S+ (?:dot|convolution)\(", text)),
        program.memory_analysis().temp_size_in_bytes,
    )
