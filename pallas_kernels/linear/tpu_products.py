"""Products of the TPU kernels of linear attention, with derivatives that are products too."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.gates import STEPS

LOG_SUBLANES = 3
SUBLANES = 1 << LOG_SUBLANES


def precise(narrow: str) -> str:
    """What to make a product in whose error in `narrow` would grow."""
    return "float32" if narrow == "float32" else "split"


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
    """The product for one head; of several, jax would put their axis between the others where only
    `b` has it, and Mosaic would move every row."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT

    def dot(batch, a, b):
        contracting = tuple((len(batch) + axis,) for axis in axes)
        return lax.dot_general(
            a,
            b,
            (contracting, (batch, batch)),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    of_heads = jax.custom_batching.custom_vmap(lambda a, b: dot((), a, b))

    @of_heads.def_vmap
    def _(size, batched, *operands):
        a, b = (
            x if has_heads else jnp.broadcast_to(x, (size, *x.shape))
            for x, has_heads in zip(operands, batched, strict=True)
        )
        return dot((0,), a, b), True

    return of_heads(a, b)


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
def divided(
    x: Float[Array, "C hv"],
    total: Float[Array, "C 1"],
    floor: Float[Array, "C 1"],
) -> Float[Array, "C hv"]:
    """x / max(|total|, floor); `floor` counts as constant."""
    return _divided_forward(x, total, floor)[0]


def _divided_forward(x, total, floor):
    part = 1.0 / jnp.maximum(jnp.abs(total), floor)
    y = x * part
    sign = jnp.where(total > floor, 1.0, jnp.where(total < -floor, -1.0, 0.0))
    return y, (y, part, sign)


def _divided_backward(saved, g):
    y, part, sign = saved
    return g * part, -jnp.sum(g * y, 1, keepdims=True) * (part * sign), None


divided.defvjp(_divided_forward, _divided_backward)


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
    """(I + a)^-1 for strictly lower triangular `a`; C a power of 2, at least 8.

    Blocks of 8 on the diagonal by substitution. From the inverse X of blocks of one size that of
    blocks twice as large is X - X L X, L the part of `a` between the two halves of each: rows of
    second halves change alone. A sum of powers of `a` would grow beyond float32 with correlated
    keys.
    """
    C = a.shape[0]
    wide = precise(narrow)
    inverse = _inverse_of_blocks(wide, a)
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    size = SUBLANES
    while size < C:
        pairs = (C // (2 * size), 2 * size, C)
        apart = (row ^ column).reshape(pairs)[:, size:].reshape(C // 2, C)
        halves = inverse.reshape(pairs)
        second = halves[:, size:].reshape(C // 2, C)
        below = product(wide, second, a, (1, 0))
        # What stands beside the block is of other pairs of halves.
        below = jnp.where((apart >= size) & (apart < 2 * size), below, 0.0)
        second = second - product(wide, below, inverse, (1, 0))
        second = second.reshape(C // (2 * size), size, C)
        inverse = jnp.concatenate([halves[:, :size], second], 1).reshape(C, C)
        size *= 2
    return inverse


def _inverse_of_blocks(wide, a):
    """The inverse of the blocks of 8 on the diagonal, all at once: one beside the other in a
    register, where number j of each row of a block is spread over the lanes of the block."""
    C, count = a.shape[0], a.shape[0] // SUBLANES
    blocks = a.reshape(count, SUBLANES, C)
    block, lane = (lax.broadcasted_iota(jnp.int32, blocks.shape, axis) for axis in (0, 2))
    mine = (lane >> LOG_SUBLANES) == block
    packed = jnp.sum(jnp.where(mine, blocks, 0.0), 0)
    row, lane = (lax.broadcasted_iota(jnp.int32, packed.shape, axis) for axis in (0, 1))
    place = lane & (SUBLANES - 1)
    numbers = [jnp.where(place == j, packed, 0.0) for j in range(SUBLANES)]
    one, other = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    same = ((one ^ other) < SUBLANES).astype(jnp.float32)
    spread = product(wide, jnp.concatenate(numbers, 0), same, (1, 0))
    inverse = (row == place).astype(jnp.float32)
    for j in range(SUBLANES - 1):
        factor = spread[j * SUBLANES : (j + 1) * SUBLANES]
        inverse = inverse - factor * inverse[j : j + 1]
    return jnp.where(mine, inverse[None], 0.0).reshape(C, C)


def _inverse_forward(narrow, a):
    x = unit_lower_inverse(narrow, a)
    return x, x


def _inverse_backward(narrow, x, g):
    wide = precise(narrow)
    da = product(wide, product(wide, x, g, (0, 0)), x, (1, 1))
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
    return None, product(precise(narrow), visible.astype(jnp.float32), g[-1], (0, 0))


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
