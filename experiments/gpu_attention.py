"""What `experiments.bench` times of attention on an NVIDIA GPU: ours, cuDNN and FlexAttention.

bfloat16, 16 heads, 2 key/value heads, head dimension 128: those of the paper's 1.6B model. Runs are
built as `experiments.timing.Worker` expects them.
"""

import glob
import math

import numpy as np

from experiments.workloads import Runs

HEADS, KV_HEADS, HEAD_DIM = 16, 2, 128
LENGTHS = (2048, 8192, 32768)
MASK_LENGTH = 8192
# Kinds of masks (`pallas_kernels.masks.examples`) that leave at most half of the blocks.
KINDS = (
    "sliding_window",
    "global_and_window",
    "packed",
    "shared_question",
    "fork_join",
    "streams, shared prefix",
    "packed & sliding_window",
)
PASSES = {"forward": 2, "forward and backward": 7}
"""Products of a visible pair of query and key in each pass."""


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA GPU."""
    return bool(glob.glob("/dev/nvidia[0-9]*"))


def rows_of(length: int) -> int:
    """Sequences of a batch: 16384 tokens, or one sequence."""
    return max(16384 // length, 1)


def flops(length: int, run: str, pairs: float) -> int:
    """Of the products of `pairs` visible pairs in a sequence, whole batch, all heads."""
    return int(2 * PASSES[run] * rows_of(length) * HEADS * HEAD_DIM * pairs)


def visible_pairs(kind: str, length: int) -> int:
    """How many pairs of query and key a mask of `pallas_kernels.masks.examples` lets through."""
    from pallas_kernels import masks
    from pallas_kernels.masks.examples import example

    mask, chunk = example(kind, 1, length), math.gcd(length, 1024)
    starts = range(0, length, chunk)
    return sum(int(np.sum(masks.dense(mask, chunk, length, first=start))) for start in starts)


def ours(length: int, kind: str, implementation: str | None = "pallas_gpu") -> Runs:
    """`pallas_kernels.attention` under one of the masks of `pallas_kernels.masks.examples`."""
    from pallas_kernels import attention
    from pallas_kernels.masks.examples import example

    mask = example(kind, 1, length)
    return _jax_runs(
        length, lambda q, k, v: attention(q, k, v, mask, implementation=implementation)
    )


def cudnn(length: int, implementation: str | None = "cudnn") -> Runs:
    """`jax.nn.dot_product_attention`, causal."""
    import jax

    def op(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return _jax_runs(length, op)


def _jax_runs(length, op) -> Runs:
    import jax
    import jax.numpy as jnp

    from experiments.workloads import op_runs

    keys = jax.random.split(jax.random.key(0), 3)
    return op_runs(
        op,
        [
            jax.random.normal(key, (rows_of(length), length, heads, HEAD_DIM), jnp.bfloat16)
            for key, heads in zip(keys, (HEADS, KV_HEADS, KV_HEADS), strict=True)
        ],
    )


def flex(length: int, kind: str, device: str = "cuda") -> Runs:
    """PyTorch's FlexAttention under the same mask, compiled, with its own block mask."""
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from pallas_kernels.masks.examples import example

    mask = example(kind, 1, length)
    intervals = None
    if mask.intervals is not None:
        intervals = np.asarray(mask.intervals).reshape(-1, 2, length)
        intervals = torch.tensor(intervals, device=device)

    def sees(batch, head, t, s):
        visible = t >= s if mask.causal else t >= 0
        if intervals is not None:
            held = (intervals[0, 0, s] <= t) & (t < intervals[0, 1, s])
            for run in intervals[1:]:
                held = held | ((run[0, s] <= t) & (t < run[1, s]))
            visible = visible & held
        return visible

    compiled = torch.compile(flex_attention) if device == "cuda" else flex_attention
    blocks = create_block_mask(sees, None, None, length, length, device=device)
    q, k, v = (
        torch.randn(
            rows_of(length), heads, length, HEAD_DIM, dtype=torch.bfloat16, device=device
        ).requires_grad_()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    weight = torch.ones_like(q)

    def wait():
        if device == "cuda":
            torch.cuda.synchronize()

    def forward():
        with torch.inference_mode():
            compiled(q, k, v, block_mask=blocks, enable_gqa=True)
        wait()

    def both():
        out = compiled(q, k, v, block_mask=blocks, enable_gqa=True)
        torch.autograd.grad(out, (q, k, v), weight)
        wait()

    return {"forward": forward, "forward and backward": both}
