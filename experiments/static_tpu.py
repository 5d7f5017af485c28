"""Estimates of the time of the TPU kernels of attention, by libtpu's own model; needs no TPU.

The compiler counts the cycles of a kernel's grid as it schedules them, with the latencies of copies
and units. It does not count the body of a condition, counts that of a loop once, and does not bound
the bandwidth of memory. So what is estimated is a grid of one kind of step, without conditions and
loops, and the time of a kernel is put together from them:

    tiles that are FULL x a step + tiles that are PARTIAL x a step with the mask
    + blocks of results x what begins and ends one

Neither the reading of the list of tiles nor that of the first step is in it. The compiler aborts
its process on kernels that the estimate does not know: each estimate has a process of its own.

On v6e a head dimension of 128 fills half of a unit of 256 x 256: the two products of a forward tile
of 1024 x 1024, without any softmax, take 2.6 times their share of the peak, by the same estimate,
and 2.1 times with scores and output transposed.

Floors: all products of the visible area (about half, if causal) at the peak of the chip in
bfloat16; all arrays once through its memory.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from parscale.chips import find_chip
from sharding.pods import topologies

# Topology, and cycles per second: the peak of the chip over the products that its units make in a
# cycle (4 of 128 x 128, or 2 of 256 x 256 and two rows).
TARGETS = {"v5e": ("v5e:2x2", 1.5e9), "v6e": ("v6e:2x2", 1.75e9)}
PRODUCTS = {"forward": 2, "query_gradients": 3, "key_gradients": 4}  # of a tile
ARRAYS = {"forward": 4, "query_gradients": 5, "key_gradients": 6}  # of [T, h], read or written
SPLASH_CHUNK = 512  # keys at a time, the fastest of 256, 512 and 1024
COLUMNS = 4  # tiles of each row of the grids that are estimated


class Step(NamedTuple):
    """What is estimated: a kernel of which every step is of one kind.

    Attributes:
      kernel: a key of `PRODUCTS`, or "splash".
      kind: "full"; "partial", with a causal mask; "whole": full, and each begins and ends a result.
      rows, keys, h: of a tile.
    """

    kernel: str
    target: str
    kind: str
    rows: int
    keys: int
    h: int


def table(T: int = 4096, h: int = 128, targets=tuple(TARGETS)) -> list[dict]:
    """The kernels for one head of T causal positions, in bfloat16.

    Returns:
      for each kernel and target: kernel, target, tile, cycles, microseconds, mxu_floor and
      hbm_floor (microseconds), ratio (to the larger floor), how (the figure was made). What could
      not be estimated has cycles, microseconds and ratio None, and in `how` the reason.
    """
    from pallas_kernels.flash import tpu

    sizes = {
        kernel: (tpu.FORWARD_TILES if kernel == "forward" else tpu.BACKWARD_TILES)[2]
        for kernel in PRODUCTS
    }
    rows = [_row(kernel, target, T, h, *sizes[kernel]) for target in targets for kernel in PRODUCTS]
    return rows + [_row("splash", target, T, h, 1024, 1024) for target in targets]


def _row(kernel: str, target: str, T: int, h: int, rows: int, keys: int) -> dict:
    import numpy as np

    from pallas_kernels import masks
    from pallas_kernels.masks import blocks

    chip, (_, clock) = find_chip(target), TARGETS[target]
    work = "forward" if kernel == "splash" else kernel
    kinds = blocks.block_kinds(masks.causal(), T, T, rows, keys)
    full, partial = (int(np.sum(kinds == kind)) for kind in (blocks.FULL, blocks.PARTIAL))
    results = kinds.shape[1] if kernel == "key_gradients" else kinds.shape[0]
    mxu = PRODUCTS[work] * 2 * h * (T * (T + 1) / 2) / chip.flops
    hbm = ARRAYS[work] * 2 * T * h / chip.bandwidth
    made = {
        "kernel": kernel,
        "target": target,
        "tile": f"{rows} x {keys}",
        "mxu_floor": mxu * 1e6,
        "hbm_floor": hbm * 1e6,
    }
    try:
        if kernel == "splash":
            step = cycles_of(Step(kernel, target, "full", rows, keys, h))
            cycles = (full + partial) * step
            how = f"{full + partial} visited tiles x {step:.0f}; no mask, no begin and end"
        else:
            step, masked, whole = (
                cycles_of(Step(kernel, target, kind, rows, keys, h))
                for kind in ("full", "partial", "whole")
            )
            # Less than nothing where, without conditions, all is scheduled together.
            ends = max(whole - step, 0)
            cycles = full * step + partial * masked + results * ends
            how = (
                f"{full} x {step:.0f} (full) + {partial} x {masked:.0f} (partial) + "
                f"{results} x {ends:.0f} (begin and end)"
            )
    except RuntimeError as error:
        return {**made, "cycles": None, "microseconds": None, "ratio": None, "how": str(error)}
    seconds = cycles / clock
    return {
        **made,
        "cycles": round(cycles),
        "microseconds": seconds * 1e6,
        "ratio": seconds / max(mxu, hbm),
        "how": how,
    }


def cycles_of(step: Step) -> float:
    """Cycles of one more step: a grid of twice as many, less one, over the difference.

    Raises:
      RuntimeError: the compiler made no estimate; the text has its reason.
    """
    once, twice = (_estimate(step, blocks) for blocks in (2, 4))
    return (twice - once) / (2 * COLUMNS)


def _estimate(step: Step, blocks: int) -> int:
    return estimate("experiments.static_tpu", [*step, blocks], "attention|splash")


def estimate(module: str, arguments: list, kernel: str) -> int:
    """Cycles of the whole grid of a kernel, from a process of its own.

    Args:
      module: what to run there; it compiles the kernel.
      arguments: for it, as JSON.
      kernel: its name begins so; a regular expression.

    Raises:
      RuntimeError: the compiler made no estimate; the text has its reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            **topologies.LIBTPU,
            "LIBTPU_INIT_ARGS": f"--xla_jf_dump_static_llo_profile_to={folder}",
        }
        done = subprocess.run(
            [sys.executable, "-m", module, json.dumps(arguments)],
            env=environment,
            cwd=pathlib.Path(__file__).parent.parent,
            capture_output=True,
            text=True,
        )
        for file in pathlib.Path(folder).glob("*_static_llo_profile.textproto"):
            found = re.search(r"estimated_cycles: (\d+)", file.read_text())
            if found and re.match(kernel, file.name):
                return int(found[1])
    reason = re.findall(r"(?:failed: |Error: |CHECK failed.*?: )(.*)", done.stderr)
    raise RuntimeError(f"no estimate: {reason[-1] if reason else f'exit code {done.returncode}'}")


def _compile(step: Step, blocks: int):
    """In the process of an estimate: compiles the kernel."""
    import jax
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    topology = topologies.get_topology_desc(platform="tpu", topology_name=TARGETS[step.target][0])
    sharding = SingleDeviceSharding(topology.devices[0])
    function, arrays = (_splash if step.kernel == "splash" else _own)(step, blocks)
    structs = [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]
    jax.jit(function).lower(*structs).compile()


class _EveryTile(NamedTuple):
    """In the place of `tpu_common.Visits`: every tile, row by row, and no list in scalar memory,
    to which the estimate for v5e knows no copy; for which reason it has none of splash there."""

    count: int
    by_keys: bool
    whole: bool
    operands: tuple = ()

    def visit(self, layout, operands, b, step):
        from jax import lax

        from pallas_kernels.flash.tpu_common import Visit

        row = lax.div(step, COLUMNS)
        column = lax.rem(step, COLUMNS)
        q_block, k_block = (column, row) if self.by_keys else (row, column)
        first, last = (True, True) if self.whole else (column == 0, column == COLUMNS - 1)
        return Visit(q_block, k_block, first, last, None)


def _own(step: Step, blocks: int):
    import jax
    import jax.numpy as jnp

    from pallas_kernels import masks
    from pallas_kernels.flash import tpu_backward, tpu_forward, tpu_layout
    from pallas_kernels.flash.options import Options
    from pallas_kernels.masks.blocks import FULL, PARTIAL

    by_keys = step.kernel == "key_gradients"
    q_blocks, k_blocks = (COLUMNS, blocks) if by_keys else (blocks, COLUMNS)
    T, S = q_blocks * step.rows, k_blocks * step.keys
    q = jax.ShapeDtypeStruct((1, 1, T, 1, 1, step.h), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 1, S, 1, step.h), jnp.bfloat16)
    layout, _ = tpu_layout.make_layout(q, k, masks.full(), None, step.rows, step.keys)
    partial = step.kind == "partial"
    layout = layout._replace(causal=partial, kinds=frozenset({PARTIAL if partial else FULL}))
    visits = _EveryTile(blocks * COLUMNS, by_keys, step.kind == "whole")
    options = Options(step.h**-0.5, None)
    queries = ((1, 1, T, step.h), jnp.bfloat16)
    keys = ((1, 1, S, step.h), jnp.bfloat16)
    rows = ((1, 1, q_blocks, 1, step.rows), jnp.float32)
    if step.kernel == "forward":
        return (
            lambda q, k, v: tpu_forward.forward(
                options, layout, visits, (q, k, v, None, None, None), False
            ),
            (queries, keys, keys),
        )
    function = getattr(tpu_backward, step.kernel)
    rest = (None,) if by_keys else (None, None, None)
    return (
        lambda q, k, v, dout, lse, delta: function(
            options, layout, visits, (q, k, v, *rest), dout, lse, delta, False
        ),
        (queries, keys, keys, queries, rows, rows),
    )


def _splash(step: Step, blocks: int):
    """jax's own kernel, without the condition around the work of a tile; its loop is unrolled."""
    import types

    import jax.numpy as jnp
    from jax.experimental import pallas as pl
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel,
        splash_attention_mask,
    )

    def when(condition):
        return lambda body: body() if body.__name__ == "run" else pl.when(condition)(body)

    splash_attention_kernel.pl = types.SimpleNamespace(**{**vars(pl), "when": when})
    T, S = blocks * step.rows, COLUMNS * step.keys
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((T, S))]),
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=step.rows, block_kv=step.keys, block_kv_compute=SPLASH_CHUNK
        ),
        head_shards=1,
        q_seq_shards=1,
    )
    return kernel, tuple(((1, n, step.h), jnp.bfloat16) for n in (T, S, S))


if __name__ == "__main__":
    *_fields, _blocks = json.loads(sys.argv[1])
    _compile(Step(*_fields), _blocks)
