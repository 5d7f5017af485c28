"""The forward kernel for TPU: softmax attention over the tiles that a mask leaves."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_common as common
from pallas_kernels.flash.tpu_common import LANES, LOWEST, Layout, Visits, cap, product, spread
from pallas_kernels.masks.blocks import FULL, PARTIAL


def forward(options, layout: Layout, visits: Visits, arrays, interpret):
    """Output and log-sum-exp of each query.

    Args:
      visits: of the kinds of blocks [I, J].
      arrays: q, k, v, runs or None, prefix keys and values or None, folded as in `tpu_common`.

    Returns:
      like q, and float32 `[sequences, K, I, 1, rows]`.
    """
    q, *_ = arrays
    L = layout

    def queries(b, head, step, codes):
        return b, head, visits.tile(L, codes, b, step).row, 0

    def keys(b, head, step, codes):
        return b, head, visits.tile(L, codes, b, step).column, 0

    def runs(b, head, step, codes):
        return L.mask_row(b), 0, visits.tile(L, codes, b, step).column

    def prefix(b, head, step, codes):
        return L.stream(b), head, 0, 0

    def rows(b, head, step, codes):
        return b, head, visits.tile(L, codes, b, step).row, 0, 0

    slots = common.round_up(L.M, LANES)
    specs = [
        pl.BlockSpec((None, None, L.rows, L.h), queries),
        pl.BlockSpec((None, None, L.block_k, L.h), keys),
        pl.BlockSpec((None, None, L.block_k, L.h), keys),
        pl.BlockSpec((None, 2 * L.R, L.block_k), runs) if L.R else None,
        pl.BlockSpec((None, None, slots, L.h), prefix) if L.M else None,
        pl.BlockSpec((None, None, slots, L.h), prefix) if L.M else None,
    ]
    return pl.pallas_call(
        functools.partial(_kernel, options, layout, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(L.sequences, L.K, visits.count),
            in_specs=specs,
            out_specs=[
                pl.BlockSpec((None, None, L.rows, L.h), queries),
                pl.BlockSpec((None, None, None, 1, L.rows), rows),
            ],
            scratch_shapes=[
                pltpu.VMEM((L.rows, LANES), jnp.float32),
                pltpu.VMEM((L.rows, LANES), jnp.float32),
                pltpu.VMEM((L.rows, L.h), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((L.sequences, L.K, L.q_blocks, 1, L.rows), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=common.VMEM_LIMIT,
        ),
        interpret=interpret,
        name="attention_forward",
    )(visits.codes, *arrays)


def _kernel(options, layout, visits, codes, q, k, v, runs, pk, pv, out, lse, top, total, acc):
    """One tile.

    Scratch: `top`, the largest score so far, equal in all lanes; `total`, the sum of the powers, of
    which each lane holds the part of its own keys; `acc`, their product with the values.
    """
    tile = visits.tile(layout, codes, pl.program_id(0), pl.program_id(2))

    def take(k, v, seen):
        s, _ = cap(options, product(q[...], k[...], (1, 1)))
        if seen is not None:
            s = jnp.where(seen(s.shape), s, -jnp.inf)
        lanes = s.shape[1]
        old = top[...]
        new = jnp.maximum(old, jnp.max(s, 1, keepdims=True))
        p = jnp.exp2(s - spread(new, lanes))
        fade = jnp.exp2(old - new)
        top[...] = new
        total[...] = total[...] * fade + sum(p[:, n : n + LANES] for n in range(0, lanes, LANES))
        acc[...] = acc[...] * spread(fade, layout.h) + product(p.astype(v.dtype), v[...], (1, 0))

    @pl.when(tile.is_first)
    def _():
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)
        if layout.M:
            take(pk, pv, None if layout.M == pk.shape[0] else _slots(layout))

    if FULL in layout.kinds:

        @pl.when(tile.kind == FULL)
        def _():
            take(k, v, None)

    if PARTIAL in layout.kinds:

        @pl.when(tile.kind == PARTIAL)
        def _():
            ends = runs[...] if layout.R else None
            take(k, v, lambda _: common.visible(layout, tile.row, tile.column, ends, 0))

    @pl.when(tile.is_last)
    def _():
        sums = jnp.sum(total[...], 1, keepdims=True)
        sees = sums > 0.0
        sums = jnp.where(sees, sums, 1.0)
        out[...] = (acc[...] / sums).astype(out.dtype)
        # As a row: a column would take a whole register for eight numbers.
        log = (top[...] + jnp.log2(sums)) * math.log(2)
        lse[...] = jnp.where(sees, log, -jnp.inf).T[:1]


def _slots(layout):
    return lambda shape: jax.lax.broadcasted_iota(jnp.int32, shape, 1) < layout.M
