"""What the TPU kernels compute of a tile: up to 128 tokens of one head, as a function of values.

The forward kernel calls `tile`, the backward kernel its derivative. So all here has a derivative
that the compiler can lower, and products have theirs without transposed copies.
"""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.linear.tpu_products import (
    decayed_products,
    divided,
    gap,
    last_row,
    precise,
    product,
    sums,
    unit_lower_inverse,
)

LANES = 128


class Form(NamedTuple):
    """What of the recurrence is known when tracing.

    Attributes:
      scale: of the outputs.
      narrow: name of the type of the operands of products.
      normalize, delta: as in `Options`; whether there is a beta.
      by_key: each dimension of a key has its own decay.
    """

    scale: float
    narrow: str
    normalize: bool
    delta: bool
    by_key: bool


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


def tile(
    form: Form,
    fixed: tuple[dict, dict],
    tokens: Tokens,
    columns: dict[str, Float[Array, "C 1"]],
    rows: dict[str, Float[Array, "1 C"]],
    before: State,
    again: State | None,
) -> tuple[Float[Array, "C hv"], State]:
    """Output, and the state after the tile.

    Args:
      fixed: more of `columns` and `rows`, of which there is no gradient.
      columns, rows: by the names of `tpu_layout.Gates`; what is missing is 1.
      before: state before the tile.
      again: what documents start from; None: zero, or there is no row `restart`.
    """
    q, k, v, decay = tokens
    columns, rows = {**columns, **fixed[0]}, {**rows, **fixed[1]}
    # What correlated keys write changes sign from token to token: their sums lose digits.
    dot = functools.partial(product, precise(form.narrow) if form.delta else form.narrow)
    visible = _visible(q.shape[0], columns, rows)
    factors = {name: columns.get(name) for name in ("enter", "leave", "restart")}
    if form.by_key:
        since = sums(form.narrow, visible, decay)
        from_start, end = sum(since), [last_row(part) for part in since]
        pairs = lambda x: decayed_products(form.narrow, x, k, since, visible)
        # Tokens of other documents than the last have a factor of 0 besides.
        to_end = gap(end, since)
        to_end = jnp.exp(jnp.where(to_end > 0.0, 0.0, to_end))
        factors = {
            "enter": _times(factors["enter"], jnp.exp(from_start)),
            "leave": _times(factors["leave"], to_end),
            "restart": None if again is None else factors["restart"] * jnp.exp(from_start),
        }
    elif "low" in rows:
        fade = columns["low"] - rows["low"]
        if "high" in rows:
            fade += columns["high"] - rows["high"]
        fade = jnp.exp(jnp.where(visible, fade, -jnp.inf))
        pairs = lambda x: dot(x, k, (1, 1)) * fade
    else:
        pairs = lambda x: jnp.where(visible, dot(x, k, (1, 1)), 0.0)

    states = [(factors["enter"], before)]
    if again is not None:
        states.append((factors["restart"], again))

    def kept(name, state):
        """The part of `state` that is left after the tile."""
        if factors[name] is None:
            return state
        keep = last_row(factors[name])
        across = _turned(keep, state.matrix.shape[1]) if form.by_key else keep
        return State(across * state.matrix, _times(keep, state.normalizer))

    if form.delta:
        overlap = jnp.where(_strict(q.shape[0]), pairs(k), 0.0) * columns["beta"]
        inverse = unit_lower_inverse(form.narrow, overlap)
        found = _joined(dot, [(_times(f, k), state.matrix) for f, state in states])
        v = dot(inverse, columns["beta"] * (v - found), (1, 0))
    scores = _times(rows.get("weight"), pairs(q))
    reads = [(_times(f, q), state) for f, state in states]
    out = _joined(dot, [(scores, v), *((x, state.matrix) for x, state in reads)])
    if form.normalize:
        total = _row_sums([scores, *(x * state.normalizer for x, state in reads)])
        out = divided(out, total, columns["floor"]) * (1.0 if form.scale > 0 else -1.0)
    else:
        out = out * form.scale
    leaving = _times(factors["leave"], k)
    after = kept("enter", before)
    matrix = after.matrix + dot(leaving, v, (0, 0))
    normalizer = after.normalizer
    if form.normalize:
        normalizer += jnp.sum(leaving, 0, keepdims=True)
    if again is not None:
        rest = kept("restart", again)
        matrix += rest.matrix
        normalizer = None if normalizer is None else normalizer + rest.normalizer
    return out, State(matrix, normalizer)


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


def _visible(C, columns, rows):
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    visible = row >= column
    if "document" in rows:
        visible &= columns["document"] == rows["document"]
    return visible


def _strict(C):
    row, column = (lax.broadcasted_iota(jnp.int32, (C, C), axis) for axis in (0, 1))
    return row > column
