"""Attention in plain XLA operations: the CPU path, and that of every platform without a kernel."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.flash.tiled import BLOCK, tiled
from pallas_kernels.masks import Mask


def attention(
    q: Float[Array, "*lead T H h"],
    k: Float[Array, "*lead S K h"],
    v: Float[Array, "*lead S K h"],
    mask: Mask,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None,
    scale: float,
    soft_cap: float | None,
) -> tuple[Float[Array, "*lead T H h"], Float[Array, "*lead T H"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    lead, (T, H, h), (S, K, _) = q.shape[:-3], q.shape[-3:], k.shape[-3:]
    N, P = math.prod(lead[:-1]), math.prod(lead[-1:])
    intervals = _fold_lead(mask.intervals, lead)
    q, out_shape = q.reshape(N, P, T, K, H // K, h), q.shape
    k, v = (x.reshape(N, P, S, K, h) for x in (k, v))
    if T >= BLOCK:
        out, lse = tiled(q, k, v, intervals, prefix, mask.causal, scale, soft_cap)
    else:
        out, lse = plain(q, k, v, Mask(intervals, mask.causal), prefix, scale, soft_cap)
    return out.reshape(out_shape), lse.reshape(out_shape[:-1])


def _fold_lead(intervals, lead):
    """Intervals `[..., R, 2, S]` as `[N, P, R, 2, S]`, where both of N and P may be 1."""
    if intervals is None:
        return None
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


def plain(q, k, v, mask, prefix, scale, soft_cap):
    """All scores at once.

    Args:
      q: `[N, P, T, K, G, h]`.
      k, v: `[N, P, S, K, h]`.
      mask: with intervals `[N or 1, P or 1, R, 2, S]`.
      prefix, scale, soft_cap: as for `attention`.

    Returns:
      output as q and float32 log-sum-exp `[N, P, T, K, G]`.
    """
    T, S = q.shape[2], k.shape[2]

    def scores(equation, keys):
        s = jnp.einsum(equation, q, keys, preferred_element_type=jnp.float32) * scale
        return s if soft_cap is None else soft_cap * jnp.tanh(s / soft_cap)

    s = scores("nptkgh,npskh->npkgts", k)
    if mask.causal or mask.intervals is not None:
        visible = masks.dense(mask, T, S)
        s = jnp.where(jnp.expand_dims(visible, (-3, -4)), s, -jnp.inf)
    top = jnp.max(s, -1, keepdims=True, initial=-jnp.inf)
    if prefix is not None:
        s_prefix = scores("nptkgh,pkmh->npkgtm", prefix[0])
        top = jnp.maximum(top, jnp.max(s_prefix, -1, keepdims=True, initial=-jnp.inf))
    top = jax.lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0.0))
    p = jnp.exp(s - top)
    total = jnp.sum(p, -1, keepdims=True)
    out = _weighted("npkgts,npskh->nptkgh", p, v)
    if prefix is not None:
        p_prefix = jnp.exp(s_prefix - top)
        total += jnp.sum(p_prefix, -1, keepdims=True)
        out += _weighted("npkgtm,pkmh->nptkgh", p_prefix, prefix[1])
    sees = total > 0.0
    lse = jnp.where(sees, top + jnp.log(jnp.where(sees, total, 1.0)), -jnp.inf)
    total = jnp.where(sees, total, 1.0)
    total, lse = (x[..., 0].transpose(0, 1, 4, 2, 3) for x in (total, lse))
    return (out / total[..., None]).astype(q.dtype), lse


def _weighted(equation, p, v):
    return jnp.einsum(equation, p.astype(v.dtype), v, preferred_element_type=jnp.float32)
