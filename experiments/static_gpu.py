"""What the compiler says about the GPU kernels, for an H200, on a machine that need not have one.

Of attention (`rows`) and of linear attention (`linear_rows`).

Registers of a thread when a kernel starts (the warpgroups then divide them anew), bytes of them
spilled to local memory, wgmma instructions in the program, bytes of shared memory of a block. These
are facts about code: nothing here is a time. Needs `pip install -e '.[gpu]'`, and ptxas.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

from sharding.settings import InputError

MISSING = "needs the CUDA plugin of jax (jax-cuda13-plugin): pip install -e '.[gpu]'"

# Of an H200, what the compiler must know; sizes in bytes.
H200 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  core_count: 132
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  device_memory_size: 151397597184
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  fpus_per_core: 128
  name: "NVIDIA H200"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
"""


RECURRENCES = ("retention", "mlstm", "gla", "gated_delta_net", "kda")


class Row(NamedTuple):
    """One compiled kernel; `registers` per thread, `spilled` and `shared` in bytes."""

    kernel: str
    dtype: str
    head_dim: int
    registers: int
    spilled: int
    wgmma: int
    shared: int


def installed() -> bool:
    return importlib.util.find_spec("jax_cuda13_plugin") is not None


def rows(head_dims=(64, 128), dtypes=("bfloat16",)) -> list[Row]:
    """The kernels of attention, forward and backward, with a causal packed mask and a prefix.

    Raises:
      InputError: the CUDA plugin is not installed, or a kernel does not compile.
    """
    return [
        row
        for dtype in dtypes
        for head_dim in head_dims
        for row in _compiled(f"compile_all({head_dim}, {dtype!r})", dtype, head_dim)
    ]


def linear_rows(head_dims=(64, 128), dtypes=("bfloat16",), recurrences=RECURRENCES) -> list[Row]:
    """The kernels of linear attention, forward and backward, with packed documents and a learnable
    state for each stream; each named after its recurrence too.

    Raises:
      InputError: as `rows`.
    """
    return [
        row._replace(kernel=f"{recurrence}: {row.kernel}")
        for dtype in dtypes
        for head_dim in head_dims
        for recurrence in recurrences
        for row in _compiled(
            f"compile_linear({recurrence!r}, {head_dim}, {dtype!r})", dtype, head_dim
        )
    ]


def _compiled(call: str, dtype: str, head_dim: int) -> list[Row]:
    """The kernels that a call of a function of this module compiles, in a process of its own."""
    if not installed():
        raise InputError(f"the static report of GPU kernels {MISSING}")
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "MOSAIC_GPU_DUMP_TO": folder,
            "MOSAIC_GPU_DUMP_PTX": "1",
            "MOSAIC_GPU_DUMP_PTXAS": "1",
        }
        code = f"from experiments import static_gpu; static_gpu.{call}"
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1:]
            raise InputError(f"head_dim={head_dim}, dtype={dtype}: {' '.join(last)}")
        return [_row(path, dtype, head_dim) for path in sorted(pathlib.Path(folder).glob("*.ptx"))]


def _row(ptx: pathlib.Path, dtype: str, head_dim: int) -> Row:
    assembler = ptx.with_suffix(".ptxas").read_text()
    passes = ptx.with_suffix(".mlir-passes.log").read_text()

    def number(pattern, text):
        return int(re.search(pattern, text)[1])

    return Row(
        re.sub(r"_\d+$", "", ptx.stem),
        dtype,
        head_dim,
        number(r"Used (\d+) registers", assembler),
        number(r"(\d+) bytes spill stores", assembler),
        ptx.read_text().count("wgmma.mma_async"),
        number(r"dynamic_shared_memory_size %c(\d+)_i32", passes),
    )


def h200():
    """The sharding of arrays on an H200 that programs can be compiled for."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    return jax.sharding.SingleDeviceSharding(topology.devices[0])


def compile_all(head_dim: int, dtype: str) -> None:
    """Compiles the kernels in this process."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels import dispatch, masks
    from pallas_kernels.flash import gpu
    from pallas_kernels.flash.options import Options

    device = h200()

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    B, P, T, K, G, M, h = 2, 2, 2048, 2, 4, 48, head_dim
    options = Options(h**-0.5, None)
    q, kv, lse = (
        array(B, P, T, K, G, h),
        array(B, P, T, K, h),
        array(B, P, T, K, G, dtype="float32"),
    )
    prefix = (array(P, K, M, h),) * 2
    intervals = array(B, 1, 1, 2, T, dtype=jnp.int32)

    def forward(q, k, v, intervals, prefix):
        mask = masks.Mask(intervals, causal=True, queries=T)
        return gpu.forward(options, q, k, v, mask, prefix)

    def backward(q, k, v, intervals, *rest):
        mask = masks.Mask(intervals, causal=True, queries=T)
        return gpu.backward(options, q, k, v, mask, *rest)

    arrays = (q, kv, kv, intervals, prefix)
    with dispatch.compiling_for("cuda"):
        jax.jit(forward).lower(*arrays).compile()
        jax.jit(backward).lower(*arrays, q, lse, q, lse).compile()


def linear_arguments(recurrence: str, length: int, head_dim: int, sharding=None, dtype="bfloat16"):
    """Shapes of (q, k, v) and of the keyword arguments of a recurrence, without `normalize`."""
    import jax

    def array(*shape, dtype="float32"):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    B, P, T, K, H, h = 2, 2, length, 2, 2, head_dim
    named = {"segment_ids": array(B, T, dtype="int32")}
    rows, state = array(B, P, T, H), array(P, H, h, h)
    if recurrence in ("retention", "mlstm", "gated_delta_net"):
        named["log_decay"] = rows
    if recurrence in ("gla", "kda"):
        named["log_decay"] = array(B, P, T, H, h)
    if recurrence in ("gated_delta_net", "kda"):
        named["beta"] = rows
    if recurrence == "mlstm":
        from pallas_kernels import NormalizedState

        named["input_gate"] = rows
        state = NormalizedState(state, array(P, H, h), array(P, H))
    named["restart_state"] = state
    qk, v = array(B, P, T, K, h, dtype=dtype), array(B, P, T, H, h, dtype=dtype)
    return (qk, qk, v), named


def linear_outputs(arrays, named, chunk=None):
    """What the kernels compute of arrays like `linear_arguments`."""
    from pallas_kernels import linear_attention

    return linear_attention(
        *arrays, **named, normalize="input_gate" in named, chunk=chunk,
        implementation="pallas_gpu",
    )  # fmt: skip


def linear_gradients(arrays, named, chunk=None):
    """The gradients of a sum, for which all of the kernels run."""
    import jax
    import jax.numpy as jnp

    fixed = {"segment_ids": named["segment_ids"]}
    moving = {name: x for name, x in named.items() if name not in fixed}

    def total(arrays, moving):
        out, state = linear_outputs(arrays, {**moving, **fixed}, chunk)
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves((out, state)))

    return jax.grad(total, (0, 1))(arrays, moving)


def compile_linear(recurrence: str, head_dim: int, dtype: str) -> None:
    """Compiles the kernels in this process."""
    import jax

    from pallas_kernels import dispatch

    arrays = linear_arguments(recurrence, 2048, head_dim, h200(), dtype)
    with dispatch.compiling_for("cuda"):
        jax.jit(linear_gradients).lower(*arrays).compile()
