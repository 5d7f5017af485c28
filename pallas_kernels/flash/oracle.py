"""Attention as it is defined, with every score in memory: what the other forms are tested by."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import masks
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
    """Output in q's dtype and float32 log-sum-exp of the scores, computed in float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    lead, (T, H, _), (S, K, _) = q.shape[:-3], q.shape[-3:], k.shape[-3:]
    k, v = (jnp.repeat(x, H // K, -2) for x in (k, v))
    visible = masks.dense(mask, T, S)
    visible = jnp.expand_dims(visible, range(visible.ndim - 2, len(lead)))
    if prefix is not None:
        slots = (jnp.repeat(x.swapaxes(1, 2), H // K, -2) for x in prefix)
        slots = [jnp.broadcast_to(x, (*lead, *x.shape[1:])) for x in slots]
        M = slots[0].shape[-3]
        k, v = (jnp.concatenate([x, y], -3) for x, y in zip(slots, (k, v), strict=True))
        seen = jnp.ones((*visible.shape[:-1], M), bool)
        visible = jnp.concatenate([seen, visible], -1)
    s = (
        jnp.einsum("...thd,...shd->...hts", q.astype(wide), k.astype(wide), precision="highest")
        * scale
    )
    if soft_cap is not None:
        s = soft_cap * jnp.tanh(s / soft_cap)
    s = jnp.where(visible[..., None, :, :], s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top > -jnp.inf, top, 0.0)
    p = jnp.exp(s - top)
    total = jnp.sum(p, -1, keepdims=True)
    sees = total > 0.0
    total = jnp.where(sees, total, 1.0)
    out = jnp.einsum("...hts,...shd->...thd", p / total, v.astype(wide), precision="highest")
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)[..., 0].swapaxes(-1, -2)
    return out.astype(q.dtype), lse
