"""The triangular systems of the delta rule in the TPU kernels.

For bfloat16 inputs their numbers are sums of two bfloat16 numbers, high and low, and a product of
two of them is three products. Blocks fill half of the lanes of the matrix unit or less, so the
three are made as one, with low parts in lanes that would hold zeros.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.linear.tpu_products import (
    LANES,
    NARROW,
    dot_of_heads,
    precise,
    product,
)

LOG_SUBLANES = 3
SUBLANES = 1 << LOG_SUBLANES


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def solved(
    narrow: str, inverse: Float[Array, "C C"], a: Float[Array, "C C"], x: Float[Array, "C n"]
) -> Float[Array, "C n"]:
    """(I + a)^-1 x, where `inverse` is that of I + a and counts as constant.

    Args:
      narrow: as of `unit_lower_inverse`.
    """
    return product(precise(narrow), inverse, x, (1, 0))


def _solved_forward(narrow, inverse, a, x):
    y = solved(narrow, inverse, a, x)
    return y, (inverse, y)


def _solved_backward(narrow, saved, g):
    inverse, y = saved
    dx = product(precise(narrow), inverse, g, (0, 0))
    # No recurrence carries the gradient of `a` on: `dx` may be rounded in it.
    return None, -product(precise(narrow, 1), dx, y, (1, 1)), dx


solved.defvjp(_solved_forward, _solved_backward)


def unit_lower_inverse(narrow: str, a: Float[Array, "C C"]) -> Float[Array, "C C"]:
    """(I + a)^-1 for strictly lower triangular `a`; C a power of 2, at least 8. No derivative.

    Blocks of 8 on the diagonal by substitution. From the inverse X of blocks of one size that of
    blocks twice as large is X - X L X, L the part of `a` between the two halves of each: rows of
    second halves change alone. A sum of powers of `a` would grow beyond float32 with correlated
    keys.

    Args:
      narrow: type of the inputs that `a` was made of, "float32" or "bfloat16".
    """
    C = a.shape[0]
    inverse = _inverse_of_blocks(narrow, a)
    product_of_blocks = _wide_product if narrow == "float32" else _split_product
    row, lane = (lax.broadcasted_iota(jnp.int32, (C // 2, C), axis) for axis in (0, 1))
    size = SUBLANES
    while size < C:
        # Row i of the second halves, whose first half begins at this lane.
        first = lane - (row & -size) * 2
        in_first = (first >= 0) & (first < size)
        top, bottom = _halves(inverse, size)
        beside = jnp.where(in_first, _halves(a, size)[1], 0.0)
        below = product_of_blocks(size, in_first, bottom, beside, False)
        bottom = bottom - product_of_blocks(size, in_first, below, top, True)
        inverse = _whole(top, bottom, size)
        size *= 2
    return inverse


def _halves(x, size):
    """The rows of first halves, and those of second halves, of blocks of `2 * size` rows."""
    pairs = x.reshape(-1, 2, size, x.shape[1])
    return tuple(pairs[:, half].reshape(-1, x.shape[1]) for half in (0, 1))


def _whole(first, second, size):
    """The reverse of `_halves`."""
    C, n = 2 * first.shape[0], first.shape[1]
    return jnp.stack([x.reshape(-1, size, n) for x in (first, second)], 1).reshape(C, n)


def _wide_product(size, in_first, x, y, from_first):
    """For each pair of halves the product of a block of `x`, in the lanes of the first half if
    `from_first` and else of the second, and one of `y`, in those of the first half, where it comes
    out."""
    rows = (y, jnp.zeros_like(y)) if from_first else (jnp.zeros_like(y), y)
    made = product(NARROW["float32"], x, _whole(*rows, size), (1, 0))
    return jnp.where(in_first, made, 0.0)


def _split_product(size, in_first, x, y, from_first):
    """The same of three products of halves: high by high, low by high, high by low."""
    C = x.shape[1]
    to_second, to_first = size, C - size
    x_high, x_low = _parts(x)
    y_high, y_low = _parts(y)
    # The low part of x meets the high one of y, which stands in the rows of both halves; the low
    # part of y is beside it, where the product has the lanes of second halves free.
    x = x_high + _turned(x_low, to_second if from_first else to_first)
    both = y_high + _turned(y_low, to_second)
    rows = (both, y_high) if from_first else (y_high, both)
    made = dot_of_heads(x.astype(jnp.bfloat16), _whole(*rows, size).astype(jnp.bfloat16), (1, 0))
    return jnp.where(in_first, made + _turned(made, to_first), 0.0)


def _parts(x):
    """Two bfloat16 numbers, as float32, of which `x` is nearly the sum."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    return high, x - high


def _turned(x, lanes):
    """`x` moved by so many lanes, the last coming first again."""
    turned = jax.custom_batching.custom_vmap(lambda x: jnp.roll(x, lanes, 1))

    @turned.def_vmap
    def _(size, batched, x):
        del size, batched
        return (pltpu.roll if x.shape[2] % LANES == 0 else jnp.roll)(x, lanes, 2), True

    return turned(x)


def _inverse_of_blocks(narrow, a):
    """The inverse of the blocks of 8 on the diagonal, all at once: one beside the other in a
    register, where number j of each row of a block is spread over the lanes of the block."""
    C, count = a.shape[0], a.shape[0] // SUBLANES
    blocks = a.reshape(count, SUBLANES, C)
    block, lane = (lax.broadcasted_iota(jnp.int32, blocks.shape, axis) for axis in (0, 2))
    mine = (lane >> LOG_SUBLANES) == block
    packed = jnp.sum(jnp.where(mine, blocks, 0.0), 0)
    row, lane = (lax.broadcasted_iota(jnp.int32, packed.shape, axis) for axis in (0, 1))
    place = lane & (SUBLANES - 1)
    spread = _spread(narrow, packed, place)
    inverse = (row == place).astype(jnp.float32)
    for j in range(SUBLANES - 1):
        factor = spread[j * SUBLANES : (j + 1) * SUBLANES]
        inverse = inverse - factor * inverse[j : j + 1]
    return jnp.where(mine, inverse[None], 0.0).reshape(C, C)


def _spread(narrow, packed, place):
    """`[8 * 8, C]`: in rows 8 * j to 8 * j + 7 number j of each block is in all its lanes."""
    C = packed.shape[1]
    one, other = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    same = ((one ^ other) < SUBLANES).astype(jnp.float32)
    if narrow == "float32":
        numbers = [jnp.where(place == j, packed, 0.0) for j in range(SUBLANES)]
        return product(NARROW[narrow], jnp.concatenate(numbers, 0), same, (1, 0))
    high, low = _parts(packed)
    # The low part in the lane beside, so that the sum of the lanes is that of both.
    low = jnp.where(place & 1 == 1, _turned(low, 1), _turned(low, C - 1))
    numbers = [
        jnp.where(place == j, high, jnp.where(place == j ^ 1, low, 0.0)) for j in range(SUBLANES)
    ]
    numbers = jnp.concatenate(numbers, 0).astype(jnp.bfloat16)
    return dot_of_heads(numbers, same.astype(jnp.bfloat16), (1, 0))
