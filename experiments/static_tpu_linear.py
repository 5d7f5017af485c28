"""Estimates of the time of the TPU kernels of linear attention, as in `static_tpu`.

All steps of a grid are alike, without a loop: the cycles of a step are the difference of two grids,
one of twice as many chunks, over the difference of their chunks. What begins and ends a sequence, a
copy of the state, stands under a condition and is not counted. So do products with a decay for each
dimension of a key: these estimates are of kernels made for decays of one strength. Where it is
strong the kernel takes one head after the other, which the estimate does not see.

Floors: the products of the chunkwise form in tiles of 128 tokens, once each, at the peak of the
chip in bfloat16, without the inverse of the delta rule; and q, k, v, the output, decays of key
dimensions, all their gradients and the states before each chunk once through its memory.
"""

import json
import sys
from typing import NamedTuple

from experiments.static_tpu import TARGETS, estimate
from parscale.chips import find_chip

TILE = 128
# Which gates there are: a decay for each head or dimension of a key, beta, an input gate; whether
# outputs are normalized; and how strong decays of a key's dimensions are.
FAMILIES = {
    "retention": ("head", False, False, False, None),
    "mlstm": ("head", False, True, True, None),
    "gla": ("key", False, False, False, "mild"),
    "gla, strong decay": ("key", False, False, False, "strong"),
    "delta": (None, True, False, False, None),
    "gated delta": ("head", True, False, False, None),
    "kda": ("key", True, False, False, "mild"),
    "kda, strong decay": ("key", True, False, False, "strong"),
}
# Matrix products of a tile, without the delta rule and with it, and arrays of [T, h].
PRODUCTS = {"forward": (4, 7), "backward": (10, 21)}
ARRAYS = {"forward": 4, "backward": 7}
SIZES = (64, 128, 256, 512)
HEADS = 4  # in all; a step has as many of them as the kernel takes at once
CHUNKS = 2  # of the smaller grid that is estimated; the larger has twice as many


class Step(NamedTuple):
    """What is estimated.

    Attributes:
      kernel: "forward", which saves states as for a backward one, or "backward".
      family: a key of `FAMILIES`.
      chunk: tokens.
      h: of keys and values.
    """

    kernel: str
    target: str
    family: str
    chunk: int
    h: int


def table(
    T: int = 4096, h: int = 128, heads: int = 32, targets=tuple(TARGETS), families=tuple(FAMILIES)
) -> list[dict]:
    """The kernels for so many heads, of all sequences together, of T positions, in bfloat16.

    Returns:
      for each family, kernel and target, with the chunk that is the default: family, kernel,
      target, chunk, cycles (of a token of a head), microseconds, mxu_floor and hbm_floor
      (microseconds), ratio (to the larger floor). What could not be estimated has cycles,
      microseconds and ratio None, and in `why` the reason.
    """
    from pallas_kernels.linear import tpu

    return [
        _row(Step(kernel, target, family, tpu.CHUNK, h), T * heads)
        for family in families
        for target in targets
        for kernel in PRODUCTS
    ]


def chunk_table(h: int = 128, targets=tuple(TARGETS), family: str = "mlstm") -> list[dict]:
    """Cycles of a token of a head by the size of the chunk, as rows of `table`, for T of 4096."""
    return [
        _row(Step(kernel, target, family, chunk, h), 2**17)
        for target in targets
        for kernel in PRODUCTS
        for chunk in SIZES
    ]


def _row(step: Step, tokens: int) -> dict:
    chip, (_, clock) = find_chip(step.target), TARGETS[step.target]
    decay, is_delta, *_ = FAMILIES[step.family]
    products = PRODUCTS[step.kernel][is_delta]
    numbers = 2 * ARRAYS[step.kernel] * step.h + 4 * step.h * step.h / step.chunk
    if decay == "key":
        numbers += 4 * step.h * (1 if step.kernel == "forward" else 2)
    mxu = tokens * products * 2 * TILE * step.h / chip.flops
    hbm = tokens * numbers / chip.bandwidth
    made = {name: getattr(step, name) for name in ("family", "kernel", "target", "chunk")}
    made |= {"mxu_floor": mxu * 1e6, "hbm_floor": hbm * 1e6}
    try:
        cycles = cycles_of(step)
    except RuntimeError as error:
        return {**made, "cycles": None, "microseconds": None, "ratio": None, "why": str(error)}
    seconds = cycles * tokens / clock
    ratio = seconds / max(mxu, hbm)
    return {**made, "cycles": cycles, "microseconds": seconds * 1e6, "ratio": ratio, "why": ""}


def cycles_of(step: Step) -> float:
    """Cycles of a token of a head.

    Raises:
      RuntimeError: the compiler made no estimate; the text has its reason.
    """
    name = f"linear_attention_{step.kernel}"
    few, many = (
        estimate("experiments.static_tpu_linear", [*step, n], name) for n in (CHUNKS, 2 * CHUNKS)
    )
    return (many - few) / (CHUNKS * step.chunk * HEADS)


def _compile(step: Step, chunks: int):
    """In the process of an estimate: compiles the kernel."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[step.target][0])
    sharding = SingleDeviceSharding(topology.devices[0])
    function, arrays = _kernel(step, chunks)
    structs = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for name, x in arrays.items()
    }
    jax.jit(function).lower(structs).compile()


def _kernel(step: Step, chunks: int):
    import jax
    import jax.numpy as jnp

    from pallas_kernels.linear import tpu, tpu_kernels, tpu_pairs
    from pallas_kernels.linear.options import Inputs, Options

    decay, beta, gate, normalize, strength = FAMILIES[step.family]
    T, H, h = chunks * step.chunk, HEADS, step.h
    options = Options(h**-0.5, normalize, step.chunk)

    def struct(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct((1, 1, T, H, *shape), dtype)

    wide = struct(h, dtype=jnp.bfloat16)
    inputs = Inputs(
        *(wide, wide, wide),
        log_decay={None: None, "head": struct(), "key": struct(h)}[decay],
        beta=struct() if beta else None,
        input_gate=struct() if gate else None,
        documents=None,
        initial=None,
        restart=None,
    )
    layout = tpu.choose_layout(options, inputs, back=step.kernel == "backward")
    names = {}
    block = {None: None, "mild": TILE, "strong": tpu_pairs.BLOCK}[strength]
    layout = layout._replace(form=layout.form._replace(block=block))

    def operands(inputs):
        arrays, found, *_ = tpu.operands(options, layout, inputs)
        names.update(found)
        return arrays

    arrays = jax.eval_shape(operands, inputs)
    if step.kernel == "forward":
        return (
            lambda arrays: tpu_kernels.forward(layout, names, arrays, jnp.bfloat16, True, False),
            arrays,
        )
    arrays |= {"dout": arrays["v"]}
    arrays |= tpu_kernels.states(layout, "starts", layout.chunks)
    arrays |= tpu_kernels.states(layout, "dend")
    return lambda arrays: tpu_kernels.backward(layout, names, arrays, False), arrays


if __name__ == "__main__":
    *_fields, _chunks = json.loads(sys.argv[1])
    _compile(Step(*_fields), _chunks)
