"""Products of queries and keys of a chunk, with the decay that lies between each two."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gates import Exact

BASE = 8
"""Size of the blocks on the diagonal whose pairs are taken one by one."""


def decayed_products(
    x: Float[Array, "*batch C hk"],
    k: Float[Array, "*batch C hk"],
    total: Exact,
) -> Float[Array, "*batch C C"]:
    """sum_d x_id k_jd exp(total_id - total_jd) for j <= i, 0 above.

    Each dimension has its own decay, `total` `[*batch, C, hk]`. The factor exp(total_i) alone would
    be too small, and exp(-total_j) too large. So a square of pairs i, j below the diagonal takes
    the sum at its corner for both: exp(total_i - corner) exp(corner - total_j), none above 1. The
    squares halve towards the diagonal, where blocks of `BASE` take each pair for itself.
    """
    fold = lambda y: y.reshape(-1, *y.shape[-2:])
    folded = _products(fold(x), fold(k), Exact(*map(fold, total)))
    return folded.reshape(*x.shape[:-1], x.shape[-2])


def _products(x, k, total):
    C = x.shape[-2]
    if C <= BASE:
        fade = total[:, :, None] - total[:, None]
        fade = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[..., None], fade, -jnp.inf))
        return jnp.sum(x[:, :, None] * k[:, None] * fade, -1)
    half = C // 2
    top, bottom = (slice(None), slice(0, half)), (slice(None), slice(half, None))
    corner = total[:, half - 1 : half]
    left = x[bottom] * jnp.exp(total[bottom] - corner)
    right = k[top] * jnp.exp(corner - total[top])
    below = left @ right.mT
    both = lambda y: jnp.concatenate([y[top], y[bottom]])
    first, second = jnp.split(_products(both(x), both(k), Exact(*map(both, total))), 2)
    upper = jnp.concatenate([first, jnp.zeros_like(below)], -1)
    return jnp.concatenate([upper, jnp.concatenate([below, second], -1)], -2)
