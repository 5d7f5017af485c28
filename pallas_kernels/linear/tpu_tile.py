"""What the TPU kernels compute of a tile: up to 128 tokens of one head, as a function of values.

The forward kernel calls these functions, the backward kernel their derivatives. So all here has a
derivative that the compiler can lower, and products have theirs without transposed copies.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.linear.tpu_inverse import solved, unit_lower_inverse
from pallas_kernels.linear.tpu_pairs import decayed_products, gap, strengths, sums, tiled
from pallas_kernels.linear.tpu_products import (
    LANES,
    NARROW,
    divided,
    last_row,
    precise,
    product,
)


class Form(NamedTuple):
    """What of the recurrence is known when tracing.

    Attributes:
      scale: of the outputs.
      narrow: name of the type of the operands of products.
      normalize, delta: as in `Options`; whether there is a beta.
      by_key: each dimension of a key has its own decay.
      block: with `by_key`, tokens of the blocks of `tpu_pairs.decayed_products`, if they are not to
        be found by the kernel.
    """

    scale: float
    narrow: str
    normalize: bool
    delta: bool
    by_key: bool
    block: int | None = None


class Tokens(NamedTuple):
    """The tokens of a tile, float32.

    Attributes:
      q, k: `[C, hk]`.
      v: `[C, hv]`.
      decay: `[C, hk]`, logarithms; None unless each dimension of a key has its own.
    """

    q: Array
    k: Array
    v: Array
    decay: Array | None


class State(NamedTuple):
    """`matrix` `[hk, hv]` and `normalizer` `[1, hk]`, or None, float32."""

    matrix: Array
    normalizer: Array | None


class Pairs(NamedTuple):
    """What a tile's tokens are to each other and to states, before any state is known.

    Attributes:
      scores: `[C, C]`, of queries and keys; with the delta rule times the scale.
      overlap, inverse: `[C, C]`, of keys with each other, strictly lower triangular, and the
        inverse of I + `overlap`; None without the delta rule.
      enter, restart, leave: `[C, 1]` or `[C, hk]`, factors as in `Rows`; None: 1.
    """

    scores: Array
    overlap: Array | None
    inverse: Array | None
    enter: Array | None
    restart: Array | None
    leave: Array | None


def make_pairs(
    form: Form,
    fixed: tuple[dict, dict],
    tokens: Tokens,
    columns: dict[str, Float[Array, "C 1"]],
    rows: dict[str, Float[Array, "1 C"]],
) -> Pairs:
    """The pairs of a tile.

    Args:
      fixed: more of `columns` and `rows`, of which there is no gradient.
      columns, rows: by the names of `tpu_layout.Gates`; what is missing is 1.
    """
    q, k, _, decay = tokens
    columns, rows = {**columns, **fixed[0]}, {**rows, **fixed[1]}
    visible = _visible(q.shape[0], columns, rows)
    enter, restart, leave = (columns.get(name) for name in ("enter", "restart", "leave"))
    # Keys and queries are exact.
    dot = functools.partial(
        product, precise(form.narrow, 1, 1) if form.delta else NARROW[form.narrow]
    )
    if form.by_key:
        # Differences of sums over all documents serve those of one.
        since = sums(form.narrow, _causal(q.shape[0]), decay)
        from_start, end = jnp.exp(sum(since)), [last_row(part) for part in since]
        # Unlike keys and queries, these times a decay are not exact.
        parts = precise(form.narrow, g=2 if form.delta else 1)
        # Exponents of float32 would lose digits in blocks of more tokens.
        size = 2 if form.narrow == "float32" else form.block
        found = strengths(decay)
        of_pairs = lambda xs: decayed_products(parts, size, found, xs, k, since, visible)
        to_end = jnp.exp(gap(end, since))
        enter = from_start if enter is None else enter * from_start
        leave = to_end if leave is None else leave * to_end
        if restart is not None:
            restart = restart * jnp.exp(sum(sums(form.narrow, visible, decay)))
    elif "low" in rows:
        fade = columns["low"] - rows["low"]
        if "high" in rows:
            fade += columns["high"] - rows["high"]
        fade = jnp.exp(jnp.where(visible, fade, -jnp.inf))
        of_pairs = lambda xs: dot(xs, k, (1, 1)) * tiled(fade, xs)
    else:
        of_pairs = lambda xs: jnp.where(tiled(visible, xs), dot(xs, k, (1, 1)), 0.0)
    overlap = inverse = None
    if form.delta:
        C = q.shape[0]
        both = of_pairs(jnp.concatenate([q, k], 0))
        scores = both[:C]
        overlap = jnp.where(_strict(C), both[C:], 0.0) * columns["beta"]
        inverse = unit_lower_inverse(form.narrow, lax.stop_gradient(overlap))
    else:
        scores = of_pairs(q)
    scores = _times(rows.get("weight"), scores)
    if form.delta:
        scores = scores * form.scale
    return Pairs(scores, overlap, inverse, enter, restart, leave)


def pass_tile(
    form: Form,
    floor: Float[Array, "C 1"] | None,
    beta: Float[Array, "C 1"] | None,
    tokens: Tokens,
    pairs: Pairs,
    before: State,
    again: State | None,
) -> tuple[Float[Array, "C hv"], State]:
    """Output, and the state after the tile.

    Args:
      floor: least divisor of normalized outputs, without gradient.
      before: state before the tile.
      again: what documents start from; None: zero, or there is no factor `restart`.
    """
    q, k, v, _ = tokens
    states = [(pairs.enter, before)]
    if again is not None:
        states.append((pairs.restart, again))
    if form.delta:
        found = sum(_read(form, k, factor, state) for factor, state in states)
        v = solved(form.narrow, pairs.inverse, pairs.overlap, beta * (v - found))
        # What correlated keys write changes sign from token to token: sums lose digits. But the
        # gradient of the product is that of the output, which is exact.
        dot = functools.partial(product, precise(form.narrow, g=1))
        reads = sum(_read(form, q, factor, state) for factor, state in states)
        out = dot(pairs.scores, v, (1, 0)) + reads * form.scale
    else:
        dot = functools.partial(product, NARROW[form.narrow])
        reads = [(_times(factor, q), state) for factor, state in states]
        out = _joined(dot, [(pairs.scores, v), *((x, state.matrix) for x, state in reads)])
        if form.normalize:
            total = _row_sums([pairs.scores, *(x * state.normalizer for x, state in reads)])
            out = divided(out, total, floor) * (1.0 if form.scale > 0 else -1.0)
        else:
            out = out * form.scale
    if form.delta and not form.by_key:
        added = product(precise(form.narrow, 1, g=1), k, _times(pairs.leave, v), (0, 0))
    else:
        leaving = _times(pairs.leave, k)
        parts = precise(form.narrow, g=1) if form.delta else NARROW[form.narrow]
        added = product(parts, leaving, v, (0, 0))
    kept = [_kept(form, factor, state) for factor, state in states]
    matrix = sum((state.matrix for state in kept), start=added)
    normalizer = None
    if form.normalize:
        normalizer = sum(
            (state.normalizer for state in kept), start=jnp.sum(leaving, 0, keepdims=True)
        )
    return out, State(matrix, normalizer)


def _read(form, x, factor, state):
    """What `x` finds in a state, with the delta rule."""
    if form.by_key:
        return product(precise(form.narrow, g=1), _times(factor, x), state.matrix, (1, 0))
    return _times(factor, product(precise(form.narrow, 1, g=1), x, state.matrix, (1, 0)))


def _kept(form, factor, state):
    """The part of `state` that is left after the tile."""
    if factor is None:
        return state
    keep = last_row(factor)
    across = _turned(keep, state.matrix.shape[1]) if form.by_key else keep
    return State(across * state.matrix, _times(keep, state.normalizer))


def _times(factor, x):
    return x if factor is None or x is None else factor * x


def _joined(dot, pairs):
    """The sum of the products of `pairs`; as one product if all are of whole registers."""
    if any(x.shape[1] % LANES for x, _ in pairs):
        return sum(dot(x, y, (1, 0)) for x, y in pairs)
    left, right = zip(*pairs, strict=True)
    return dot(jnp.concatenate(left, 1), jnp.concatenate(right, 0), (1, 0))


def _row_sums(parts):
    """Of all `parts` together, `[C, 1]`; those of one width are added before."""
    widths = {x.shape[1] for x in parts}
    sums = (sum(x for x in parts if x.shape[1] == width) for width in sorted(widths))
    return sum(jnp.sum(x, 1, keepdims=True) for x in sums)


def _turned(row, columns):
    """The numbers of `row` `[1, n]` along the sublanes, `[n, columns]`."""
    return jnp.broadcast_to(row, (columns, row.shape[1])).T


def _causal(C):
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return row >= column


def _visible(C, columns, rows):
    visible = _causal(C)
    if "document" in rows:
        visible &= columns["document"] == rows["document"]
    return visible


def _strict(C):
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return row > column
