"""Products of the TPU kernels of linear attention, with derivatives that are products too."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

LANES = 128


class Parts(NamedTuple):
    """Of how many bfloat16 numbers each operand of a product is taken as the sum; 0: float32.

    Attributes:
      a, b: 2 parts, high and low, where an error of bfloat16 would grow; 1 if it is exact or may be
        rounded.
      g: of the gradient of the product.
    """

    a: int
    b: int
    g: int


NARROW = {"bfloat16": Parts(1, 1, 1), "float32": Parts(0, 0, 0)}
"""By the name of the type of the inputs."""


def precise(narrow: str, a: int = 2, b: int = 2, g: int = 2) -> Parts:
    """Those of a product in which errors of type `narrow` would grow."""
    return Parts(0, 0, 0) if narrow == "float32" else Parts(a, b, g)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(
    parts: Parts, a: Float[Array, "..."], b: Float[Array, "..."], axes: tuple[int, int]
) -> Float[Array, "m n"]:
    """Contracts these axes of two float32 matrices: float32 sums of products of their parts, but
    for those of two low ones."""
    if not parts.a:
        return dot_of_heads(a, b, axes)
    a, b = _parts(a, parts.a), _parts(b, parts.b)
    pairs = [(x, y) for i, x in enumerate(a) for j, y in enumerate(b) if i + j < 2]
    if a[0].shape[axes[0]] % LANES:
        return sum(dot_of_heads(x, y, axes) for x, y in pairs)
    # As one product, which fills a matrix unit of more than LANES rows.
    a, b = (
        jnp.concatenate(x, axis) for x, axis in zip(zip(*pairs, strict=True), axes, strict=True)
    )
    return dot_of_heads(a, b, axes)


def _parts(x, count):
    high = x.astype(jnp.bfloat16)
    return [high] if count == 1 else [high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)]


def dot_of_heads(a, b, axes):
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


def _product_forward(parts, a, b, axes):
    return product(parts, a, b, axes), (a, b)


def _product_backward(parts, axes, saved, g):
    a, b = saved
    ia, ib = axes

    def gradient(x, x_parts, y, y_parts, x_axis, y_axis, wanted):
        return product(Parts(x_parts, y_parts, wanted), x, y, (x_axis, y_axis))

    of_g, of_a, of_b = (g, parts.g), (a, parts.a), (b, parts.b)
    if ia:
        da = gradient(*of_g, *of_b, 1, 1 - ib, parts.a)
    else:
        da = gradient(*of_b, *of_g, 1 - ib, 1, parts.a)
    if ib:
        db = gradient(*of_g, *of_a, 0, 1 - ia, parts.b)
    else:
        db = gradient(*of_a, *of_g, 1 - ia, 0, parts.b)
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
