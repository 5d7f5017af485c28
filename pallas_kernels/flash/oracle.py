"""Attention as it is defined, with every score in memory: what the other forms are tested by."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import masks
from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask


def attention(
    options: Options,
    q: Float[Array, "N P T K G h"],
    k: Float[Array, "N P S K h"],
    v: Float[Array, "N P S K h"],
    mask: Mask,
    prefix: tuple[Float[Array, "P K M h"], Float[Array, "P K M h"]] | None,
) -> tuple[Float[Array, "N P T K G h"], Float[Array, "N P T K G"]]:
    """Output in q's dtype and log-sum-exp of the scores, computed in float32 or wider."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    N, T, S = q.shape[0], q.shape[2], k.shape[2]
    visible = masks.dense(mask, T, S)[..., None, None, :, :]
    if prefix is not None:
        slots = [jnp.broadcast_to(x.swapaxes(1, 2), (N, *x.swapaxes(1, 2).shape)) for x in prefix]
        k, v = (jnp.concatenate([x, y], 2) for x, y in zip(slots, (k, v), strict=True))
        seen = jnp.ones((*visible.shape[:-1], k.shape[2] - S), bool)
        visible = jnp.concatenate([seen, visible], -1)
    s = jnp.einsum("nptkgh,npskh->npkgts", q.astype(wide), k.astype(wide), precision="highest")
    s = s * options.scale
    if options.soft_cap is not None:
        s = options.soft_cap * jnp.tanh(s / options.soft_cap)
    s = jnp.where(visible, s, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(s, -1, keepdims=True, initial=-jnp.inf))
    top = jnp.where(top > -jnp.inf, top, 0.0)
    p = jnp.exp(s - top)
    total = jnp.sum(p, -1, keepdims=True)
    sees = total > 0.0
    total = jnp.where(sees, total, 1.0)
    out = jnp.einsum("npkgts,npskh->nptkgh", p / total, v.astype(wide), precision="highest")
    lse = jnp.where(sees, top + jnp.log(total), -jnp.inf)[..., 0].transpose(0, 1, 4, 2, 3)
    return out.astype(q.dtype), lse
