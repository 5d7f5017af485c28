"""Products of the TPU kernels of linear attention, with derivatives that are products too."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.gates import STEPS


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(
    narrow: str, a: Float[Array, "..."], b: Float[Array, "..."], axes: tuple[int, int]
) -> Float[Array, "m n"]:
    """Contracts these axes of two float32 matrices: float32 sums of products in type `narrow`.

    Args:
      narrow: "bfloat16"; "float32"; or "split": operands are sums of two bfloat16 numbers.
    """
    if narrow == "split":
        (a, rest_a), (b, rest_b) = _split(a), _split(b)
        return _dot(a, b, axes) + (_dot(a, rest_b, axes) + _dot(rest_a, b, axes))
    return _dot(a.astype(narrow), b.astype(narrow), axes)


def _split(x):
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _dot(a, b, axes):
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _product_forward(narrow, a, b, axes):
    return product(narrow, a, b, axes), (a, b)


def _product_backward(narrow, axes, saved, g):
    a, b = saved
    ia, ib = axes
    da = product(narrow, g, b, (1, 1 - ib)) if ia else product(narrow, b, g, (1 - ib, 1))
    db = product(narrow, g, a, (0, 1 - ia)) if ib else product(narrow, a, g, (1 - ia, 0))
    return da, db


product.defvjp(_product_forward, _product_backward)


@jax.custom_vjp
def last_row(x: Float[Array, "C n"]) -> Float[Array, "1 n"]:
    return x[-1:]


def _last_row_forward(x):
    return last_row(x), x


def _last_row_backward(x, g):
    row = lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return (jnp.where(row == x.shape[0] - 1, g, 0.0),)


last_row.defvjp(_last_row_forward, _last_row_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def unit_lower_inverse(narrow: str, a: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """(I + a)^-1 for strictly lower triangular `a`; C a power of 2.

    From the inverse X of the blocks of one size on the diagonal that of blocks twice as large is
    X - X L X, L the part of `a` between the two halves of each. A sum of powers of `a` would grow
    beyond float32 with correlated keys.
    """
    C = a.shape[0]
    precise = _precise(narrow)
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    apart = row ^ column
    inverse = jnp.where(row == column, 1.0, jnp.where(apart == 1, -a, 0.0))
    size = 2
    while size < C:
        below = jnp.where((apart >= size) & (apart < 2 * size), a, 0.0)
        below = product(precise, product(precise, inverse, below, (1, 0)), inverse, (1, 0))
        inverse = inverse - below
        size *= 2
    return inverse


def _precise(narrow):
    return "float32" if narrow == "float32" else "split"


def _inverse_forward(narrow, a):
    x = unit_lower_inverse(narrow, a)
    return x, x


def _inverse_backward(narrow, x, g):
    precise = _precise(narrow)
    da = product(precise, product(precise, x, g, (0, 0)), x, (1, 1))
    row, column = (lax.broadcasted_iota(jnp.int32, x.shape, axis) for axis in (0, 1))
    return (jnp.where(row > column, -da, 0.0),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(
    narrow: str, visible: Bool[Array, "C C"], steps: Float[Array, "C hk"]
) -> tuple[Array, ...]:
    """For each token the sum of the steps that it sees, `[C, hk]`, in parts of which it is the sum.

    One part is enough for bfloat16. For float32 the first has the sums of whole multiples of
    1 / STEPS: differences of large sums are then exact.
    """
    high = jnp.round(steps * STEPS) / STEPS
    ones = visible.astype(jnp.float32).astype(jnp.bfloat16)
    # Two bfloat16 numbers have 16 bits, those of `high`; sums of them are exact.
    parts = [
        sum(_dot(ones, x, (1, 0)) for x in _split(high)),
        sum(_dot(ones, x, (1, 0)) for x in _split(steps - high)),
    ]
    return tuple(parts) if narrow == "float32" else (parts[0] + parts[1],)


def _sums_forward(narrow, visible, steps):
    return sums(narrow, visible, steps), visible


def _sums_backward(narrow, visible, g):
    return None, product(_precise(narrow), visible.astype(jnp.float32), g[-1], (0, 0))


sums.defvjp(_sums_forward, _sums_backward)


def gap(a, b):
    """a - b of numbers in parts."""
    return sum(x - y for x, y in zip(a, b, strict=True))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def decayed_products(
    narrow: str,
    x: Float[Array, "C hk"],
    k: Float[Array, "C hk"],
    total: tuple[Array, ...],
    visible: Bool[Array, "C C"],
) -> Float[Array, "C C"]:
    """sum_d x_id k_jd exp(total_id - total_jd) where j is visible to i, else 0.

    As in `pallas_kernels.linear.pairs`: pairs of tokens in the two halves of a block take the last
    sum of the first half for both, so that no factor is above 1; the blocks halve down to one
    token.

    Args:
      total: as of `sums`; its gradient is that of the last part.
    """
    same, *halves = _halvings(total, visible)
    scores = jnp.where(same, jnp.sum(x * k, 1, keepdims=True), 0.0)
    for factor, mask in halves:
        scores = jnp.where(mask, product(narrow, x * factor, k * factor, (1, 1)), scores)
    return scores


def _halvings(total, visible):
    """Which pairs are one token with itself; then, of blocks of each size, exp(-|total - corner|)
    and the visible pairs between their halves."""
    C = total[0].shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    apart = row ^ column
    levels = [visible & (row == column)]
    size = 1
    while size < C:
        corner = [_corners(part, size) for part in total]
        # Without the sign a sum of another document, no bound there, makes no factor above 1.
        factor = jnp.exp(-jnp.abs(gap(total, corner)))
        levels.append((factor, visible & (apart >= size) & (apart < 2 * size)))
        size *= 2
    return levels


def _corners(total, size):
    """For each token the sum at the end of the first half of its block of `2 * size`."""
    C, n = total.shape
    group = max(2 * size, 8)
    parts = total.reshape(C // group, group, n)
    corner = jnp.broadcast_to(parts[:, size - 1 : size], parts.shape)
    row = lax.broadcasted_iota(jnp.int32, parts.shape, 1)
    for start in range(2 * size, group, 2 * size):
        other = parts[:, start + size - 1 : start + size]
        corner = jnp.where(row >= start, jnp.broadcast_to(other, parts.shape), corner)
    return corner.reshape(C, n)


def _decayed_forward(narrow, x, k, total, visible):
    return decayed_products(narrow, x, k, total, visible), (x, k, total, visible)


def _decayed_backward(narrow, saved, g):
    x, k, total, visible = saved
    same, *halves = _halvings(total, visible)
    own = jnp.sum(jnp.where(same, g, 0.0), 1, keepdims=True)
    dx, dk = own * k, own * x
    dtotal = jnp.zeros_like(k)
    for factor, mask in halves:
        part = jnp.where(mask, g, 0.0)
        dleft = product(narrow, part, k * factor, (1, 0)) * factor
        dright = product(narrow, part, x * factor, (0, 0)) * factor
        dx, dk, dtotal = dx + dleft, dk + dright, dtotal + (x * dleft - k * dright)
    return dx, dk, (*(jnp.zeros_like(part) for part in total[:-1]), dtotal), None


decayed_products.defvjp(_decayed_forward, _decayed_backward)
