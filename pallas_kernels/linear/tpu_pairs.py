"""Products of queries and keys of a tile with the decay between each two, in the TPU kernels."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from pallas_kernels.linear.gates import STEPS
from pallas_kernels.linear.tpu_products import Parts, precise, product

MILD = 64.0
"""Sum of the sizes of log decays up to which exponents of either sign stay far within float32."""

BLOCK = 16
"""Tokens that share a middle where those of a whole tile cannot."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def sums(
    narrow: str, visible: Bool[Array, "C C"], steps: Float[Array, "C hk"]
) -> tuple[Array, ...]:
    """For each token the sum of the steps that it sees, `[C, hk]`, in parts of which it is the sum.

    One part is enough for bfloat16. For float32 the first has the sums of whole multiples of
    1 / STEPS: differences of large sums are then exact.
    """
    ones = visible.astype(jnp.float32)
    if narrow == "bfloat16":
        return (product(Parts(1, 2, 2), ones, steps, (1, 0)),)
    # Two bfloat16 numbers have 16 bits, those of `high`; sums of them are exact.
    high = jnp.round(steps * STEPS) / STEPS
    return tuple(product(Parts(1, 2, 2), ones, x, (1, 0)) for x in (high, steps - high))


def _sums_forward(narrow, visible, steps):
    return sums(narrow, visible, steps), visible


def _sums_backward(narrow, visible, g):
    return None, product(precise(narrow, a=1), visible.astype(jnp.float32), g[-1], (0, 0))


sums.defvjp(_sums_forward, _sums_backward)


def gap(a, b):
    """a - b of numbers in parts."""
    return sum(x - y for x, y in zip(a, b, strict=True))


def strengths(decay: Float[Array, "C hk"]) -> Float[Array, "blocks hk"]:
    """The sums of the sizes of log decays of blocks of BLOCK tokens."""
    return jnp.sum(jnp.abs(decay).reshape(-1, BLOCK, decay.shape[1]), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def decayed_products(
    parts: Parts,
    size: int | None,
    strength: Float[Array, "blocks hk"],
    xs: Float[Array, "m hk"],
    k: Float[Array, "C hk"],
    total: tuple[Array, ...],
    visible: Bool[Array, "C C"],
) -> Float[Array, "m C"]:
    """sum_d x_id k_jd exp(total_id - total_jd) where j is visible to i, else 0.

    Pairs of tokens of one block take the sum in its middle, c, for both: exp(total_i - c) and
    exp(c - total_j), which float32 must hold. Pairs of tokens in the two halves of a larger block
    take the last sum of the first half, so that no factor is above 1; these blocks double up to the
    whole tile. So there is one product for the blocks and one for each doubling.

    Args:
      parts: of `xs` and `k` times these factors.
      size: of the blocks; None: the tile where its decays are mild, else BLOCK tokens where those
        of each block are, else 2.
      strength: of `strengths`, of the decays that were summed.
      xs: whole arrays of C rows, one below the other.
      total: as of `sums`, over the whole tile; its gradient is that of the last part.
    """
    return _by_strength(functools.partial(_products, parts), size, strength, xs, k, total, visible)


def _decayed_forward(parts, size, *arrays):
    return decayed_products(parts, size, *arrays), arrays


def _decayed_backward(parts, size, arrays, g):
    dxs, dk, dtotal = _by_strength(functools.partial(_pull_products, parts), size, *arrays, g)
    return None, dxs, dk, (*(jnp.zeros_like(part) for part in arrays[3][:-1]), dtotal), None


decayed_products.defvjp(_decayed_forward, _decayed_backward)


def _by_strength(function, size, strength, *arrays):
    """`function(size, *arrays)`, for the size of blocks that decays allow if None is given: for all
    heads together if that is the tile, else for one after the other, for which there is memory."""
    if size is not None:
        return function(size, *arrays)

    def is_mild(blocks):
        return jnp.max(blocks) < MILD

    of_tile, *of_blocks = (
        functools.partial(function, size) for size in (arrays[1].shape[0], BLOCK, 2)
    )

    @jax.custom_batching.custom_vmap
    def of_heads(strength, arrays):
        return lax.cond(is_mild(strength), *of_blocks, *arrays)

    @of_heads.def_vmap
    def _(heads, batched, strength, arrays):
        def widen(x, has_heads):
            return x if has_heads else jnp.broadcast_to(x, (heads, *x.shape))

        def one_by_one(*arrays):
            made = []
            for i in range(heads):
                # Still with an axis of heads, which products in the kernels need.
                head = jax.tree.map(lambda x, i=i: x[i : i + 1], arrays)
                made.append(lax.cond(is_mild(strength[i]), *map(jax.vmap, of_blocks), *head))
            return jax.tree.map(lambda *x: jnp.concatenate(x), *made)

        strength, arrays = jax.tree.map(widen, (strength, arrays), tuple(batched))
        is_mild_tile = is_mild(jnp.sum(strength, 1))
        made = lax.cond(is_mild_tile, jax.vmap(of_tile), one_by_one, *arrays)
        return made, jax.tree.map(lambda _: True, made)

    return of_heads(strength, arrays)


def _products(parts, size, xs, k, total, visible):
    same, *levels = _levels(size, total, visible)
    scores = jnp.where(tiled(same, xs), jnp.sum(xs * tiled(k, xs), 1, keepdims=True), 0.0)
    for left, right, mask in levels:
        made = product(parts, xs * tiled(left, xs), k * right, (1, 1))
        scores = jnp.where(tiled(mask, xs), made, scores)
    return scores


def _pull_products(parts, size, xs, k, total, visible, g):
    same, *levels = _levels(size, total, visible)
    dxs, dk = jnp.zeros_like(xs), jnp.zeros_like(k)
    for left, right, mask in levels:
        left, part = tiled(left, xs), jnp.where(tiled(mask, xs), g, 0.0)
        dxs += product(Parts(parts.g, parts.b, parts.a), part, k * right, (1, 0)) * left
        dk += product(Parts(parts.g, parts.a, parts.b), part, xs * left, (0, 0)) * right
    # total_i stands beside x_i, and -total_j beside k_j, in one product.
    dtotal = _sum_of_arrays(xs * dxs, k) - k * dk
    own = jnp.sum(jnp.where(tiled(same, xs), g, 0.0), 1, keepdims=True)
    return dxs + own * tiled(k, xs), dk + _sum_of_arrays(own * xs, k), dtotal


def _levels(size, total, visible):
    """Which pairs are a token with itself, where there is no decay to round; then factors of
    queries and of keys, and the pairs that take them: the others of one block, and those of the two
    halves of blocks from twice this size to the tile."""
    C = total[0].shape[0]
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    apart = row ^ column
    since = _since_corner(total, size // 2)
    own = visible & (apart > 0) & (apart < size)
    levels = [visible & (apart == 0), (jnp.exp(since), jnp.exp(-since), own)]
    while size < C:
        factor = jnp.exp(-jnp.abs(_since_corner(total, size)))
        levels.append((factor, factor, visible & (apart >= size) & (apart < 2 * size)))
        size *= 2
    return levels


def _since_corner(total, size):
    """For each token its sum less that at the end of the first half of its block of `2 * size`."""
    return gap(total, [_corners(part, size) for part in total])


def _corners(total, size):
    C, n = total.shape
    group = max(2 * size, 8)
    parts = total.reshape(C // group, group, n)
    corner = jnp.broadcast_to(parts[:, size - 1 : size], parts.shape)
    row = lax.broadcasted_iota(jnp.int32, parts.shape, 1)
    for start in range(2 * size, group, 2 * size):
        other = parts[:, start + size - 1 : start + size]
        corner = jnp.where(row >= start, jnp.broadcast_to(other, parts.shape), corner)
    return corner.reshape(C, n)


def tiled(x: Float[Array, "C n"], like: Float[Array, "m n"]) -> Array:
    """As many of `x`, one below the other, as there are arrays of its rows in `like`."""
    count = like.shape[0] // x.shape[0]
    return x if count == 1 else jnp.concatenate([x] * count, 0)


def _sum_of_arrays(x, like):
    """The reverse of `tiled`."""
    C = like.shape[0]
    return sum(x[start : start + C] for start in range(0, x.shape[0], C))
