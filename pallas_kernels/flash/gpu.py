"""Attention by Mosaic GPU kernels, for Hopper: float16 and bfloat16 (its tensor cores round float32)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.flash import gpu_forward, gpu_keys
from pallas_kernels.flash.gpu_tiles import BLOCK
from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask

DTYPES = ("bfloat16", "float16")
SHARED_MEMORY = 227 * 1024  # bytes for one program


def forward(
    options: Options,
    q: Float[Array, "N P T K G h"],
    k: Float[Array, "N P S K h"],
    v: Float[Array, "N P S K h"],
    mask: Mask,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None,
) -> tuple[Float[Array, "N P T K G h"], Float[Array, "N P T K G"]]:
    """Output and log-sum-exp, as `pallas_kernels.flash.api` asks of an implementation.

    Raises:
      ValueError: a dtype other than bfloat16 and float16, or different ones.
    """
    _check(q, k, v, prefix)
    N, P, T, K, G, h = q.shape
    block_k, stages = 128, 2
    static = _static(mask, q, k, prefix, block_k, stages)
    inputs = _inputs(mask, static, k, v, prefix)
    out, lse = gpu_forward.call(options, static, _queries(q), inputs)
    out = out[:, :T, :, :h].reshape(q.shape)
    lse = lse[:, :, :T].reshape(N, P, K, G, T)
    return out, jnp.moveaxis(lse, -1, 2)


def _check(q, k, v, prefix):
    if q.dtype not in DTYPES:
        raise ValueError(f"q.dtype is {q.dtype}: 'pallas_gpu' expects bfloat16 or float16")
    for name, x in [("k", k), ("v", v), *zip(("prefix k", "prefix v"), prefix or (), strict=False)]:
        if x.dtype != q.dtype:
            raise ValueError(f"{name} is {x.dtype}: expected {q.dtype}, the dtype of q")


def _static(mask, q, k, prefix, block_k, stages):
    _, P, T, _, G, _ = q.shape
    lead = (1, 1) if mask.intervals is None else mask.intervals.shape[:2]
    slots = 0 if prefix is None else prefix[0].shape[2]
    return gpu_keys.Static(
        P, G, T, k.shape[2], slots, block_k, stages, *lead, mask.causal, mask.dilation
    )


def _inputs(mask, static, k, v, prefix):
    block = static.block_k
    k, v = (_padded(x.reshape(-1, *x.shape[2:]), block) for x in (k, v))
    slots = [None, None]
    if prefix is not None:
        slots = [_padded(x.swapaxes(1, 2), block) for x in prefix]
    visits = gpu_keys.visits(mask, static, BLOCK, block)
    return gpu_keys.Inputs(k, v, *slots, visits, gpu_keys.mask_runs(mask, k.shape[1], block))


def _queries(x):
    """`[N, P, T, K, G, h]` as `[N P, padded T, K G, padded h]`."""
    N, P, T, K, G, h = x.shape
    return _padded(x.reshape(N * P, T, K * G, h), BLOCK)


def _padded(x, block):
    """`[b, positions, heads, h]` with whole blocks of positions, and h a multiple of 32."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, -x.shape[-1] % 32)])
