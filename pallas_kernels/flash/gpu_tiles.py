"""Arithmetic on tiles that the Mosaic GPU kernels share.

A tile of scores lies in the registers of one warpgroup, in the layout of wgmma's results. An
interpreter has neither layouts nor that instruction with an operand in registers; there the same
values are computed as ordinary arrays. `dispatch.interpret()` says which of the two is traced.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import dispatch
from pallas_kernels.flash.options import Options

ROWS = 64  # of a tile: what one warpgroup multiplies at once
WARPGROUPS = 2  # that compute; one more copies
BLOCK = ROWS * WARPGROUPS
LOG2_E = math.log2(math.e)

MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def laid_out(x, layout):
    """`x` in registers in the given layout; a load from memory must be passed directly."""
    return x if dispatch.interpret() else plgpu.layout_cast(x, layout)


def filled(shape, value, layout):
    """A float32 tile, or a vector along one of its axes."""
    return laid_out(jnp.full(shape, value, jnp.float32), layout)


def positions(shape, axis, first):
    """int32 positions along an axis of a tile, from `first`."""
    return laid_out(lax.broadcasted_iota(jnp.int32, shape, axis), MATRIX) + first


def spread(x, shape, axis):
    """A vector along `axis` of a tile, repeated along the other one."""
    return lax.broadcast_in_dim(x, shape, (axis,))


class Product(NamedTuple):
    """sums + a b, or sums + a b^T if `transposed`, in float32.

    Attributes:
      a: a tile in shared memory or in registers.
      b: a tile in shared memory.
      sums: a tile in registers; None: zeros.
    """

    a: object
    b: object
    sums: object = None
    transposed: bool = False


def multiply(*products: Product, meanwhile=lambda: None):
    """The results of products that are on their way together.

    `meanwhile` is called while they are, before their end is awaited.
    """
    if dispatch.interpret():
        meanwhile()
        return [_interpreted(*product) for product in products]

    def issue(results):
        for result, (a, b, _, transposed) in zip(results, products, strict=True):
            plgpu.wgmma(result, a, b.transpose((1, 0)) if transposed else b)
        meanwhile()

    def start(product):
        if product.sums is not None:
            return product.sums
        columns = product.b.shape[0 if product.transposed else 1]
        return filled((product.a.shape[0], columns), 0.0, MATRIX)

    return pl.run_state(issue)([plgpu.ACC.init(start(product)) for product in products])


def _interpreted(a, b, sums, transposed):
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    result = lax.dot_general(a[...], b[...], contracted, preferred_element_type=jnp.float32)
    return result if sums is None else sums + result


def shared(shape, dtype):
    """Shared memory for tiles `[..., rows, h]`, as wgmma reads them; h a multiple of 16."""
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(shape[-1] * size * 8)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scores(options: Options, raw):
    """Products of queries and keys as (x, unit): the scores are x * unit * log(2), and unit > 0."""
    scale, cap = options
    if cap is not None:
        return tanh(raw * (scale / cap)), abs(cap) * LOG2_E
    if scale > 0:
        return raw, scale * LOG2_E
    return raw * scale, LOG2_E


def score_gradient(options: Options, x, gradient):
    """The gradient of the raw products, but for the factor `scale`, from that of the scores."""
    return gradient if options.soft_cap is None else gradient * (1.0 - x * x)


def tanh(x):
    # The hardware's own is too coarse to be multiplied by a large soft cap.
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2_E)))


def visible(t, s, runs, keys: int, causal: bool, dilation: int):
    """Which queries `t` see which keys `s`.

    Args:
      t, s: int32 positions, of the shape of a tile.
      runs: starts and ends of one run after the other, of the shape of a tile; empty: no limit.
      keys: S; later ones are padding, whose runs are empty where there are runs.
    """
    pairs = zip(runs[::2], runs[1::2], strict=True)
    held = [(t >= start) & (t < end) for start, end in pairs]
    tests = [functools.reduce(operator.or_, held) if held else s < keys]
    if causal:
        tests.append(s <= t)
    if dilation > 1:
        tests.append(lax.rem(t - s, jnp.full_like(t, dilation)) == 0)
    return functools.reduce(operator.and_, tests)


def share_work(copy, compute):
    """Within a program: the last warpgroup copies and the others compute.

    Args:
      copy: called by the last one; it gives up registers for the others.
      compute: called by each other one with its index.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(24, action="decrease")
        copy()

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(240, action="increase")
        compute(warpgroup)


def run(name, body, outs, scratch, grid, operands):
    """Calls `body(operands, outs, scratch)`, all refs, for each point of (batch, head, block).

    Args:
      name: of the kernel, in profiles.
      outs: shapes and dtypes of the results.
      scratch: memory by name.
      grid: sizes; blocks vary fastest.
      operands: a tree of arrays.
    """

    def kernel(inputs, *rest):
        body(inputs, rest[: len(outs)], dict(zip(scratch, rest[len(outs) :], strict=True)))

    kernel.__name__ = name
    call = plgpu.kernel(
        kernel,
        out_type=tuple(outs),
        scratch_types=tuple(scratch.values()),
        grid=grid,
        grid_names=("batch", "head", "block"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=dispatch.interpret(),
    )
    return call(operands)
