"""Products of queries and keys of a chunk, with the decay that lies between each two."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gates import Exact

BASE = 4
"""Size of the blocks on the diagonal whose pairs are taken one by one."""

MILD = 32.0
"""Exponents, of either sign, whose factors and products stay far within float32."""


@jax.custom_vjp
def decayed_products(
    xs: tuple[Float[Array, "*batch C hk"], ...],
    k: Float[Array, "*batch C hk"],
    total: Exact,
) -> list[Float[Array, "*batch C C"]]:
    """sum_d x_id k_jd exp(total_id - total_jd) for j <= i, 0 above, for each x of `xs`.

    Each dimension has its own decay, `total` `[*batch, C, hk]`. The factor exp(total_i) alone would
    be too small, and exp(-total_j) too large. So a square of pairs i, j below the diagonal takes
    the sum at its corner for both: exp(total_i - corner) exp(corner - total_j), none above 1. The
    squares halve towards the diagonal, where blocks of `BASE` take each pair for itself. Where no
    sum is further than `MILD` from that in the middle of its chunk, the middle serves all pairs.
    """
    fold = lambda y: y.reshape(-1, *y.shape[-2:])
    arguments = tuple(map(fold, xs)), fold(k), Exact(*map(fold, total))
    products = jax.lax.cond(_is_mild(total), _at_once, _by_halves, *arguments)
    return [y.reshape(*k.shape[:-1], k.shape[-2]) for y in products]


def _is_mild(total):
    # Products through the middle reach exp(2 MILD) above the diagonal, and are still finite there.
    sums = total.high + total.low
    middle = sums[..., sums.shape[-2] // 2, :]
    return jnp.max(jnp.abs(sums - middle[..., None, :])) < MILD


def _forward(xs, k, total):
    return decayed_products(xs, k, total), (xs, k, total)


def _backward(saved, dproducts):
    xs, k, total = saved
    fold = lambda y: y.reshape(-1, *y.shape[-2:])
    arguments = tuple(map(fold, xs)), fold(k), Exact(*map(fold, total)), list(map(fold, dproducts))

    def pull(form):
        # Within the branch, so that neither keeps room for what the other would save.
        def call(xs, k, total, dproducts):
            return jax.vjp(lambda xs, k: form(xs, k, total), xs, k)[1](dproducts)

        return call

    dxs, dk = jax.lax.cond(_is_mild(total), pull(_at_once), pull(_by_halves), *arguments)
    dxs, dk = [dx.reshape(x.shape) for dx, x in zip(dxs, xs, strict=True)], dk.reshape(k.shape)
    # total_i stands beside x_i, and -total_j beside k_j, in one product.
    dtotal = sum(x * dx for x, dx in zip(xs, dxs, strict=True)) - k * dk
    return type(xs)(dxs), dk, Exact(jnp.zeros_like(dtotal), dtotal)


decayed_products.defvjp(_forward, _backward)


def _at_once(xs, k, total):
    middle = total[:, k.shape[1] // 2]
    from_middle = total - Exact(middle.high[:, None], middle.low[:, None])
    right = (k * jnp.exp(-from_middle)).mT
    left = jnp.exp(from_middle)
    return [jnp.tril((x * left) @ right) for x in xs]


def _by_halves(xs, k, total):
    batch, C, hk = k.shape
    size = min(BASE, C)

    def blocks(y):
        return y.reshape(batch, -1, size, hk)

    sums = Exact(*map(blocks, total))
    fade = sums[:, :, :, None] - sums[:, :, None]
    fade = jnp.exp(jnp.where(jnp.tri(size, dtype=bool)[..., None], fade, -jnp.inf))
    faded = blocks(k)[:, :, None] * fade
    whole = [jnp.sum(blocks(x)[:, :, :, None] * faded, -1) for x in xs]
    while size < C:
        # Two neighbours of this size make one block of twice the size.
        first, second = (slice(None), slice(0, None, 2)), (slice(None), slice(1, None, 2))
        sums = Exact(*map(blocks, total))
        corner = sums[first][:, :, -1:]
        left = jnp.exp(sums[second] - corner)
        right = (blocks(k)[first] * jnp.exp(corner - sums[first])).mT
        for i, x in enumerate(xs):
            below = (blocks(x)[second] * left) @ right
            upper = jnp.concatenate([whole[i][first], jnp.zeros_like(below)], -1)
            lower = jnp.concatenate([below, whole[i][second]], -1)
            whole[i] = jnp.concatenate([upper, lower], -2)
        size *= 2
    return [y[:, 0] for y in whole]
