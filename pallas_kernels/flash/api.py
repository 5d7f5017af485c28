"""The public attention op: checks its arguments and chooses the implementation.

An implementation is a pair of functions over arrays with folded axes, q `[N, P, T, K, G, h]`, k and
v `[N, P, S, K, h]`: N all leading axes but the last (P), and G query heads for each of K key/value
heads. The mask's intervals are then `[N or 1, P or 1, R, 2, S]`.

    forward(options, q, k, v, mask, prefix) -> (out, lse)
    backward(options, q, k, v, mask, prefix, out, lse, dout, dlse) -> (dq, dk, dv, dprefix)

`out` is like q; `lse` float32 `[N, P, T, K, G]`; a query that sees nothing has `out` zero and `lse`
-inf. Gradients have the types of what they are gradients of; `dprefix` is None without a prefix.
"""

import dataclasses
import functools
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.flash import oracle, xla
from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask


def _lazily(module: str, name: str):
    """A function of a module that is imported when it is first called: Pallas takes its time."""

    def call(*args):
        return getattr(importlib.import_module(module), name)(*args)

    return call


MODULES = {
    "xla": "pallas_kernels.flash.xla",
    "pallas_tpu": "pallas_kernels.flash.tpu",
    "pallas_gpu": "pallas_kernels.flash.gpu",
}
FORWARD = {name: _lazily(module, "forward") for name, module in MODULES.items()}
BACKWARD = {name: _lazily(module, "backward") for name, module in MODULES.items()}


def attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    mask: Mask,
    *,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
) -> Float[Array, "*lead T H h"] | tuple[Float[Array, "*lead T H h"], Float[Array, "*lead T H"]]:
    """Grouped-query softmax attention; query head j reads key/value head j // (H // K).

    Scores, softmax and accumulation are float32, also for wider inputs. A query that sees nothing
    has output zero, log-sum-exp -inf, and gives no gradient. It has first derivatives in reverse
    mode; for others take the oracle.

    Args:
      q: queries; any leading axes, usually B, P.
      k, v: keys and values, with the leading axes of q.
      mask: which keys each query sees (`pallas_kernels.masks`).
      prefix: keys and values of M slots that every query sees, for each entry of the last leading
        axis P; read by index, never broadcast over the other leading axes.
      scale: of the scores, a Python number; h ** -0.5 by default.
      soft_cap: c > 0, a Python number, to replace each score s by c tanh(s / c).
      return_lse: also return the log-sum-exp of each query's scores.
      implementation: "xla" (on any platform), "pallas_tpu", "pallas_gpu" (Hopper, of
        bfloat16 and float16), or "oracle" (every score in memory); None: the best that the
        platform has for arrays of these types. On a TPU or GPU it may refuse a mask whose lists or
        runs do not fit on the chip; "xla" takes it.

    Returns:
      the output in q's dtype; with `return_lse` a pair of it and float32 `[..., T, H]`.

    Raises:
      ValueError: an unknown implementation or one that cannot run here, or arguments that do not
        fit together.
    """
    check_arguments(q, k, v, mask, prefix)
    options = _options(q, scale, soft_cap)
    if prefix is not None:
        # Without slots it is none; a kernel has no block of size 0.
        prefix = tuple(prefix) if prefix[0].shape[-2] else None
    lead, (T, H, h), (S, K, _) = q.shape[:-3], q.shape[-3:], k.shape[-3:]
    N, P = math.prod(lead[:-1]), math.prod(lead[-1:])
    arrays = (
        q.reshape(N, P, T, K, H // K, h),
        k.reshape(N, P, S, K, h),
        v.reshape(N, P, S, K, h),
        dataclasses.replace(mask, intervals=_fold_lead(mask.intervals, lead)),
        prefix,
    )
    dispatch.check(implementation, ("oracle", *FORWARD))
    if implementation == "oracle":
        out, lse = oracle.attention(options, *arrays)
    elif 0 in (N, P, T, S) or (implementation in (None, "xla") and T < xla.PLAIN_BELOW):
        out, lse = xla.plain(options, *arrays)
    else:
        out, lse = _attention((implementation, options), *arrays)
    out, lse = out.reshape(q.shape), lse.reshape(q.shape[:-1])
    return (out, lse) if return_lse else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static, *arrays):
    return _forward(static, *arrays)[0]


def _forward(static, *arrays):
    out, lse = _choose(FORWARD, static, arrays)(*arrays)
    return (out, lse), (*arrays, out, lse)


def _backward(static, saved, cotangents):
    dq, dk, dv, dprefix = _choose(BACKWARD, static, saved[:5])(*saved, *cotangents)
    return dq, dk, dv, None, dprefix


def _choose(functions, static, arrays):
    implementation, options = static
    q, k, v, _, prefix = arrays
    is_mixed = len({x.dtype for x in (q, k, v, *(prefix or ()))}) > 1
    functions = {name: functools.partial(f, options) for name, f in functions.items()}
    if implementation is None:
        for name in dispatch.PLATFORM_OF:
            if not dispatch.fits(name):
                continue
            if is_mixed or importlib.import_module(MODULES[name]).unfit(q):
                del functions[name]
    return dispatch.choose(implementation, functions)


_attention.defvjp(_forward, _backward)


def _fold_lead(intervals, lead):
    """Intervals `[..., R, 2, S]` as `[N, P, R, 2, S]`, where both of N and P may be 1."""
    if intervals is None:
        return None
    intervals = jnp.asarray(intervals, jnp.int32)
    *axes, R, two, S = intervals.shape
    axes = axes + [1] * (len(lead) - len(axes))
    last = axes[-1] if axes else 1
    rows = 1
    if any(n > 1 for n in axes[:-1]):
        rows = math.prod(lead[:-1])
        intervals = jnp.broadcast_to(
            intervals.reshape(*axes, R, two, S), (*lead[:-1], last, R, two, S)
        )
    return intervals.reshape(rows, last, R, two, S)


def _options(q, scale, soft_cap) -> Options:
    try:
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        soft_cap = None if soft_cap is None else float(soft_cap)
    except TypeError:
        raise ValueError(
            f"scale={scale}, soft_cap={soft_cap}: expected Python numbers, known when tracing"
        ) from None
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"soft_cap={soft_cap}: expected a number above 0, or None")
    return Options(scale, soft_cap)


def check_arguments(q, k, v, mask, prefix):
    """Raises ValueError, with the shapes, for arguments that do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3 or 0 in x.shape[-2:]:
            raise ValueError(f"{name} {x.shape}: expected [..., positions, heads, head dimension]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype is {x.dtype}: expected a floating type")
    lead, (T, H, h) = q.shape[:-3], q.shape[-3:]
    S, K = k.shape[-3:-1]
    if k.shape != v.shape or k.shape != (*lead, S, K, h):
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected q [..., T, H, h] and "
            "k, v [..., S, K, h] with equal leading axes and head dimension"
        )
    if H % K:
        raise ValueError(f"{H} query heads: expected a multiple of the {K} key/value heads")
    _check_mask(mask, lead, T, S)
    if prefix is not None:
        shapes = [part.shape for part in prefix]
        slots = shapes[0][-2:-1] if shapes else ()
        expected = (*lead[-1:], K, *slots, h)
        if not lead or not slots or shapes != [expected, expected]:
            raise ValueError(
                f"prefix of shapes {shapes} for q {q.shape}: expected two of [P, K, M, h], "
                f"P the last leading axis of q, with K={K} and h={h}"
            )


def _check_mask(mask, lead, T, S):
    if not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__}: expected one of `pallas_kernels.masks`, "
            "such as masks.causal(); masks.from_dense makes one of an array"
        )
    if mask.queries not in (None, T):
        raise ValueError(f"mask made for {mask.queries} queries, q has {T}")
    if mask.causal and S != T:
        raise ValueError(f"a causal mask of {T} queries and {S} keys: expected as many of both")
    if mask.dilation < 1:
        raise ValueError(f"mask of dilation {mask.dilation}: expected at least 1")
    if mask.intervals is None:
        return
    shape, dtype = mask.intervals.shape, mask.intervals.dtype
    if len(shape) < 3 or not shape[-3] or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"mask intervals {shape} of {dtype}: expected integers [..., R, 2, {S}]")
    *axes, _, pair, keys = shape
    fits = all(n in (1, size) for n, size in zip(axes, lead, strict=False))
    if pair != 2 or keys != S or len(axes) > len(lead) or not fits:
        raise ValueError(
            f"mask intervals {mask.intervals.shape}: expected [..., R, 2, {S}] with leading "
            f"axes that broadcast, from the left, to {lead}"
        )
    if not isinstance(mask.intervals, jax.core.Tracer):
        ends = np.asarray(mask.intervals)
        if ends.size and (ends.min() < 0 or ends.max() > T):
            raise ValueError(
                f"mask intervals from {ends.min()} to {ends.max()}: expected 0 to {T}, the "
                "number of queries"
            )
