"""What the Mosaic GPU kernels share: products of tiles, scores, visibility, and the lists of blocks.

A tile of scores lies in the registers of one warpgroup in the layout of wgmma. An interpreter has
neither that instruction with operands in registers nor layouts; there the same values are computed
as ordinary arrays. Which of the two is traced depends on `dispatch.interpret()`.
"""

import functools
import math
import operator
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from pallas_kernels import dispatch
from pallas_kernels.flash.options import Options
from pallas_kernels.masks import Mask, blocks

ROWS = 64  # of a tile: what one warpgroup multiplies at once
WARPGROUPS = 2  # that compute; one more copies
BLOCK = ROWS * WARPGROUPS
PREFIX = 1 + max(blocks.EMPTY, blocks.PARTIAL, blocks.FULL)  # one more kind of block
LOG2_E = math.log2(math.e)

MATRIX = plgpu.Layout.WGMMA
PER_ROW = plgpu.Layout.WGMMA.reduce(1)
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def laid_out(x, layout):
    """`x` in registers in the given layout; a load must be passed directly."""
    return x if dispatch.interpret() else plgpu.layout_cast(x, layout)


def full(shape, value, layout):
    return laid_out(jnp.full(shape, value, jnp.float32), layout)


def spread(x, shape, axis):
    """A vector along `axis` of `shape`, repeated along the other one."""
    return lax.broadcast_in_dim(x, shape, (axis,))


def product(a, b):
    """a b^T in float32, of tiles in shared memory."""
    if dispatch.interpret():
        contracted = (((1,), (1,)), ((), ()))
        return lax.dot_general(a[...], b[...], contracted, preferred_element_type=jnp.float32)

    def multiply(sums):
        plgpu.wgmma(sums, a, plgpu.transpose_ref(b, (1, 0)))
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))


def add_product(sums, a, b):
    """sums + a b, with `sums` and `a` in registers and `b` in shared memory."""
    if dispatch.interpret():
        return sums + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(sums))


def tile(shape, dtype):
    """Shared memory for tiles `[..., rows, h]`, as wgmma reads them."""
    swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
    columns = swizzle // jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scores(options: Options, raw):
    """Products of queries and keys as (x, c): the scores in units of log 2 are c x, and c > 0."""
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
    # The hardware's own tanh is not accurate enough to be multiplied by a large soft cap.
    return 1.0 - 2.0 / (1.0 + jnp.exp2(x * (2.0 * LOG2_E)))


class Visits(NamedTuple):
    """What a kernel that loops over the blocks of a row needs of a mask.

    Attributes:
      codes: int32 `[m, I, J]`, the blocks of each row: 4 * column + kind.
      counts: int32 `[m, I]`, how many.
      runs: int32 `[m, keys / width, 2 R, width]`, starts and ends for groups of keys; or None.
    """

    codes: Int[Array, "m I J"]
    counts: Int[Array, "m I"]
    runs: Int[Array, "m j r width"] | None


class Static(NamedTuple):
    """What a mask's kernels know when they are traced.

    Attributes:
      streams, queries, keys: P, T, S.
      rows, columns: 1 or more: whether the mask differs over N and over P.
      causal, dilation: of the mask.
    """

    streams: int
    queries: int
    keys: int
    rows: int
    columns: int
    causal: bool
    dilation: int

    def entry(self, b):
        """The mask's index m for the index b over N and P."""
        n = lax.div(b, self.streams) if self.rows > 1 else 0
        p = lax.rem(b, self.streams) if self.columns > 1 else 0
        return n * self.columns + p


def static_of(mask: Mask, streams: int, queries: int, keys: int) -> Static:
    rows, columns = (1, 1) if mask.intervals is None else mask.intervals.shape[:2]
    return Static(streams, queries, keys, rows, columns, mask.causal, mask.dilation)


def visits(mask: Mask, static: Static, block_q: int, block_k: int, by_keys=False) -> Visits:
    """Lists of the blocks of keys for each block of queries; by_keys: the other way round."""
    T, S = static.queries, static.keys
    kinds = blocks.block_kinds(mask, T, S, block_q, block_k)
    lists = blocks.row_lists(kinds.swapaxes(-1, -2) if by_keys else kinds)
    codes = lists.columns * 4 + lists.kinds
    codes = jnp.asarray(codes, jnp.int32).reshape(-1, *codes.shape[-2:])
    counts = jnp.asarray(lists.counts, jnp.int32).reshape(-1, codes.shape[1])
    return Visits(codes, counts, None)


def runs_of(mask: Mask, width: int, keys: int) -> Int[Array, "m j r width"] | None:
    """The runs of `keys` keys, at least S, in groups; padding has empty runs."""
    if mask.intervals is None:
        return None
    Nm, Pm, R, _, S = mask.intervals.shape
    runs = jnp.pad(mask.intervals, [(0, 0)] * 4 + [(0, keys - S)])
    return runs.reshape(Nm * Pm, 2 * R, keys // width, width).swapaxes(1, 2)


def visible(static: Static, t, s, runs):
    """Which queries `t` see which keys `s`, of a block that is not FULL.

    Args:
      t, s: int32 positions, of the shape of the tile.
      runs: None, or starts and ends of one run after the other, of the shape of the tile.
    """
    tests = []
    if runs is not None:
        held = [(t >= start) & (t < end) for start, end in zip(runs[::2], runs[1::2], strict=True)]
        tests.append(functools.reduce(operator.or_, held))
    else:
        tests.append(s < static.keys)
    if static.causal:
        tests.append(s <= t)
    if static.dilation > 1:
        tests.append(lax.rem(t - s, jnp.full_like(t, static.dilation)) == 0)
    return functools.reduce(operator.and_, tests)


def positions(shape, axis, first):
    iota = lax.broadcasted_iota(jnp.int32, shape, axis)
    return laid_out(iota, MATRIX) + first


def grid_call(body, outs, scratch, grid, operands):
    """Runs `body(operands, outs, scratch)` on a grid (batch, heads, blocks), blocks fastest."""

    def kernel(inputs, *rest):
        body(inputs, rest[: len(outs)], dict(zip(scratch, rest[len(outs) :], strict=True)))

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


class Keys(NamedTuple):
    """Keys and values with padded axes.

    Attributes:
      k, v: `[N P, S, K, h]`, S a multiple of the block.
      prefix_k, prefix_v: `[P, M, K, h]`, M a multiple of the block; or None.
    """

    k: Array
    v: Array
    prefix_k: Array | None
    prefix_v: Array | None


def key_ring_scratch(static, slots, keys: Keys, visits: Visits):
    """Shared memory of a `KeyRing`, by name."""
    h, dtype = keys.k.shape[-1], keys.k.dtype
    scratch = {
        "k": tile((slots, static.block_k, h), dtype),
        "v": tile((slots, static.block_k, h), dtype),
        "k_ready": plgpu.Barrier(num_arrivals=1 + (visits.runs is not None), num_barriers=slots),
        "v_ready": plgpu.Barrier(num_barriers=slots),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=slots),
    }
    if visits.runs is not None:
        scratch["runs"] = plgpu.SMEM((slots, *visits.runs.shape[2:]), jnp.int32)
    return scratch
