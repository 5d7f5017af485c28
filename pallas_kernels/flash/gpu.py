"""Attention by Mosaic GPU kernels, for Hopper, of bfloat16 and float16.

Its tensor cores round float32 operands to 11 bits, so float32 is refused rather than computed as
something else. Positions are padded to whole blocks, head dimensions to a multiple of 32.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.flash import gpu_backward, gpu_forward, gpu_keys
from pallas_kernels.flash.gpu_tiles import BLOCK, LOG2_E, ROWS
from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask

DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 160
SHARED_MEMORY = 220 * 1024  # bytes of one program for tiles; Hopper has 227 KiB
MAX_STAGES = 4


class Blocks(NamedTuple):
    """Positions in a block of the other axis, and how many blocks are in memory at a time."""

    block: int
    stages: int


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
      ValueError: a dtype other than bfloat16 and float16, a head dimension above 160, or more
        runs than fit.
    """
    _check(q, k, v, prefix)
    N, P, T, K, G, h = q.shape
    static = _static(mask, q, k, prefix, forward_blocks(_width(h), _runs(mask)))
    inputs = _inputs(mask, static, k, v, prefix)
    out, lse = gpu_forward.call(options, static, _queries(q), inputs)
    lse = lse[:, :, :T].reshape(N, P, K, G, T)
    return _cut(out, T, h).reshape(q.shape), jnp.moveaxis(lse, -1, 2)


def backward(options: Options, q, k, v, mask: Mask, prefix, out, lse, dout, dlse):
    """Gradients (dq, dk, dv, dprefix), as `pallas_kernels.flash.api` asks of an implementation.

    Raises:
      ValueError: as `forward`.
    """
    _check(q, k, v, prefix)
    T, h, S = q.shape[2], q.shape[-1], k.shape[2]
    wide = jnp.float32
    delta = jnp.sum(out.astype(wide) * dout.astype(wide), -1) - dlse
    delta = jnp.where(lse == -jnp.inf, 0.0, delta)
    queries = gpu_backward.Queries(
        _queries(q), _queries(dout.astype(q.dtype)), _vector(lse * LOG2_E), _vector(delta)
    )
    static = _static(mask, q, k, prefix, queries_blocks(_width(h), _runs(mask)))
    inputs = _inputs(mask, static, k, v, prefix)
    dq = gpu_backward.queries_gradient(options, static, queries, inputs)
    dk, dv = _keys_gradient(options, queries, q, k, v, mask)
    dprefix = None
    if prefix is not None:
        dprefix = _prefix_gradient(options, queries, q, prefix)
    dk, dv = (_cut(x, S, h).reshape(k.shape) for x in (dk, dv))
    return _cut(dq, T, h).reshape(q.shape), dk, dv, dprefix


# The largest blocks whose kernels need no (forward) or few registers more than there are. With a
# head dimension that is a multiple of 64, they are multiples of 64, else of 32.


def forward_blocks(h: int, runs: int) -> Blocks:
    """Of keys, for a padded head dimension and a number R of runs."""
    block = 128 if h <= 128 else 96
    return Blocks(block, _stages(block * (2 * 2 * h + 8 * runs), 2 * BLOCK * h, runs))


def queries_blocks(h: int, runs: int) -> Blocks:
    """Of keys, where gradients of queries are computed."""
    block = 128 if h <= 64 else 64
    return Blocks(block, _stages(block * (2 * 2 * h + 8 * runs), 2 * 2 * BLOCK * h, runs))


def keys_blocks(h: int, runs: int) -> Blocks:
    """Of queries, where gradients of keys are computed."""
    block = 64 if h <= 128 else 32
    return Blocks(block, _stages(block * (2 * 2 * h + 8), BLOCK * (2 * 2 * h + 8 * runs), runs))


def _stages(each, fixed, runs):
    stages = min(MAX_STAGES, (SHARED_MEMORY - fixed) // each)
    if stages < 1:
        raise ValueError(f"a mask of {runs} runs: 'pallas_gpu' has no shared memory for as many")
    return stages


def _runs(mask):
    return 0 if mask.intervals is None else mask.intervals.shape[-3]


def _keys_gradient(options, queries, q, k, v, mask):
    block_q, stages = keys_blocks(_width(q.shape[-1]), _runs(mask))
    static = _static(mask, q, k, None, Blocks(BLOCK, stages))
    k, v = (_padded(x.reshape(-1, *x.shape[2:])) for x in (k, v))
    visits = gpu_keys.visits(mask, static, block_q, BLOCK, by_keys=True)
    runs = gpu_keys.mask_runs(mask, k.shape[1], ROWS)
    inputs = gpu_backward.KeyInputs(k, v, visits, runs)
    return gpu_backward.keys_gradient(options, static, block_q, queries, inputs)


def _prefix_gradient(options, queries, q, prefix):
    """As of keys that every query sees, for each entry of N; then their sum."""
    (N, P, _, K, _, h), M = q.shape, prefix[0].shape[2]
    if not M:
        return tuple(jnp.zeros_like(x) for x in prefix)
    # Of the padding too, which is cut away: the gradient of a key depends on no other key.
    k, v = (_padded(x.swapaxes(1, 2)) for x in prefix)
    block_q, stages = keys_blocks(_width(h), 0)
    static = _static(masks.full(), q, k[None], None, Blocks(BLOCK, stages))
    visits = gpu_keys.visits(masks.full(), static, block_q, BLOCK, by_keys=True)
    inputs = gpu_backward.KeyInputs(k, v, visits, None)
    parts = gpu_backward.keys_gradient(options, static, block_q, queries, inputs)

    def total(x):
        x = _cut(x, M, h).reshape(N, P, M, K, h).astype(jnp.float32)
        return jnp.sum(x, 0).swapaxes(1, 2).astype(prefix[0].dtype)

    return tuple(total(x) for x in parts)


def unfit(q) -> str:
    """Why these kernels cannot take `q`, by its dtype and shape; "" if they can."""
    if q.dtype not in DTYPES:
        return f"q.dtype is {q.dtype}: 'pallas_gpu' expects bfloat16 or float16"
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"q {q.shape}: 'pallas_gpu' expects a head dimension of at most {MAX_HEAD_DIM}"
    return ""


def _check(q, k, v, prefix):
    why = unfit(q)
    if why:
        raise ValueError(why)
    slots = dict(zip(("prefix keys", "prefix values"), prefix or (), strict=False))
    for name, x in {"k": k, "v": v, **slots}.items():
        if x.dtype != q.dtype:
            raise ValueError(f"{name} of dtype {x.dtype}: expected {q.dtype}, as of q")


def _static(mask, q, k, prefix, blocks):
    _, P, T, _, G, _ = q.shape
    lead = (1, 1) if mask.intervals is None else mask.intervals.shape[:2]
    slots = 0 if prefix is None else prefix[0].shape[2]
    return gpu_keys.Static(P, G, T, k.shape[2], slots, *blocks, *lead, mask.causal, mask.dilation)


def _inputs(mask, static, k, v, prefix):
    block = static.block_k
    k, v = (_padded(x.reshape(-1, *x.shape[2:]), block) for x in (k, v))
    slots = (None, None)
    if static.slots:
        slots = [_padded(x.swapaxes(1, 2), block) for x in prefix]
    visits = gpu_keys.visits(mask, static, BLOCK, block)
    runs = gpu_keys.mask_runs(mask, k.shape[1], block)
    return gpu_keys.Inputs(k, v, *slots, visits, runs)


def _queries(x):
    """`[N, P, T, K, G, h]` as `[N P, T, H, h]`, padded."""
    N, P, T, K, G, h = x.shape
    return _padded(x.reshape(N * P, T, K * G, h))


def _vector(x):
    """`[N, P, T, K, G]` as `[N P, H, T]`, padded."""
    N, P, T, K, G = x.shape
    x = jnp.moveaxis(x, 2, -1).reshape(N * P, K * G, T)
    return jnp.pad(x, [(0, 0), (0, 0), (0, -T % BLOCK)])


def _padded(x, block=BLOCK):
    """`[b, positions, heads, h]` with whole blocks of positions, and h padded."""
    h = x.shape[-1]
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, _width(h) - h)])


def _cut(x, positions, h):
    return x[:, :positions, :, :h]


def _width(h):
    return math.ceil(h / 32) * 32
