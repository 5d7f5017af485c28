"""The short causal convolution of recurrent mixers, which documents do not see each other in."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from models.context import Context
from sharding import rules, sequence
from sharding.sequence.state import tokens_before

PART = ("batch", "streams", "length", "heads", None)
BEFORE = ("batch", "streams", None, "heads", None)


def convolve(
    x: Float[Array, "B P T heads h"],
    taps: Float[Array, "size heads h"],
    context: Context,
    before: Float[Array, "B P size_less_1 heads h"] | None = None,
    begun: Float[Array, "B P size_less_1 heads h"] | None = None,
) -> tuple[Float[Array, "B P T heads h"], Float[Array, "B P size_less_1 heads h"]]:
    """The causal convolution of each channel with its taps, the last of which meets the own token.

    Where positions lie over devices, each gets the last `size - 1` of those before its part.

    Args:
      x: inputs.
      taps: weights.
      context: says where documents begin, which do not see each other.
      before: inputs of the tokens before these, of the document that the row goes on with; None:
        as `begun`. Padding then stands behind a row's tokens.
      begun: what stands before every document, the same in every row; None: zero.

    Returns:
      the output, and the inputs of the last tokens that are no padding, as `before`.
    """
    size, parts = len(taps), 1 if before is not None else sequence.parts()
    sequence.check_length(x.shape[2], parts)
    if before is None:
        shape = (*x.shape[:2], size - 1, *x.shape[3:])
        before = jnp.zeros(shape, x.dtype) if begun is None else begun
    before, taps = before.astype(x.dtype), taps.astype(x.dtype)
    arguments = (x, taps, context.document_starts(), before, begun)
    if parts > 1 and 0 < size - 1 <= x.shape[2] // parts:
        specs = [
            None if array is None else rules.partition_spec(axes)
            for array, axes in zip(
                arguments, (PART, (None, "heads"), ("batch", "length"), BEFORE, BEFORE), strict=True
            )
        ]
        y = jax.shard_map(
            functools.partial(_of_part, parts),
            in_specs=tuple(specs),
            out_specs=specs[0],
            check_vma=False,
        )(*arguments)
    else:
        y = _of_row(*arguments)
    x = jnp.concatenate([before, x], 2)
    last = jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, size - 1, 1))
    return y, last(x, context.real_tokens())


def _of_part(parts, x, taps, starts, before, begun):
    """`_of_row` of a device's part, within `shard_map`."""
    first = jax.lax.axis_index(sequence.AXIS) * x.shape[2]
    before = tokens_before(x, len(taps) - 1, before, 2, parts)
    return _of_row(x, taps, starts, before, begun, first)


def _of_row(x, taps, starts: Int[Array, "B T"] | None, before, begun, first=0):
    """The output for tokens at `first` and after, given where each one's document starts."""
    size, length = len(taps), x.shape[2]
    x = jnp.concatenate([before, x], 2)
    y = x[:, :, size - 1 :] * taps[-1]
    for back in range(1, size):
        place = size - 1 - back
        part = x[:, :, place : place + length]
        if starts is not None:
            offset = first + jnp.arange(length) - starts
            other = 0
            if begun is not None:
                other = jnp.take(begun[0], jnp.clip(offset + place, 0, size - 2), 1)
                other = jnp.moveaxis(other, 1, 0).astype(x.dtype)
            # What a row begins with goes on from `before`, which is in its place.
            outside = (starts > 0) & (offset < back)
            part = jnp.where(outside[:, None, :, None, None], other, part)
        y = y + part * taps[place]
    return y
