"""Products of queries and keys of a chunk, with the decay that lies between each two."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gates import Exact

BASE = 8
"""Size of the blocks on the diagonal whose pairs are taken one by one."""


def decayed_products(
    xs: tuple[Float[Array, "*batch C hk"], ...],
    k: Float[Array, "*batch C hk"],
    total: Exact,
) -> list[Float[Array, "*batch C C"]]:
    """sum_d x_id k_jd exp(total_id - total_jd) for j <= i, 0 above, for each x of `xs`.

    Each dimension has its own decay, `total` `[*batch, C, hk]`. The factor exp(total_i) alone would
    be too small, and exp(-total_j) too large. So a square of pairs i, j below the diagonal takes
    the sum at its corner for both: exp(total_i - corner) exp(corner - total_j), none above 1. The
    squares halve towards the diagonal, where blocks of `BASE` take each pair for itself.
    """
    fold = lambda y: y.reshape(-1, *y.shape[-2:])
    products = _products([fold(x) for x in xs], fold(k), Exact(*map(fold, total)))
    return [y.reshape(*k.shape[:-1], k.shape[-2]) for y in products]


def _products(xs, k, total):
    C = k.shape[-2]
    if C <= BASE:
        fade = total[:, :, None] - total[:, None]
        fade = jnp.exp(jnp.where(jnp.tri(C, dtype=bool)[..., None], fade, -jnp.inf))
        faded = k[:, None] * fade
        return [jnp.sum(x[:, :, None] * faded, -1) for x in xs]
    half = C // 2
    top, bottom = (slice(None), slice(0, half)), (slice(None), slice(half, None))
    both = lambda y: jnp.concatenate([y[top], y[bottom]])
    inner = _products([both(x) for x in xs], both(k), Exact(*map(both, total)))
    corner = total[:, half - 1 : half]
    left = jnp.exp(total[bottom] - corner)
    right = (k[top] * jnp.exp(corner - total[top])).mT
    whole = []
    for x, diagonal in zip(xs, inner, strict=True):
        first, second = jnp.split(diagonal, 2)
        below = (x[bottom] * left) @ right
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        whole.append(jnp.concatenate([upper, jnp.concatenate([below, second], -1)], -2))
    return whole
