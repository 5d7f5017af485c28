"""The forward kernel for TPU: softmax attention over the tiles that a mask leaves."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_common as common
from pallas_kernels.flash.tpu_common import LOWEST, Visits, cap, product, spread
from pallas_kernels.flash.tpu_layout import LANES, Layout

CHUNK = 512  # keys


def forward(options, layout: Layout, visits: Visits, arrays, interpret):
    """Output and log-sum-exp of each query.

    Args:
      visits: of the kinds of blocks [I, J].
      arrays: q, k, v, runs or None, prefix keys and values or None, folded as in `tpu_common`.

    Returns:
      like q, and float32 `[sequences, K, I, 1, rows]`.
    """
    L = layout
    q, *_ = arrays
    spec = common.specs(L, visits)
    return pl.pallas_call(
        functools.partial(_kernel, options, layout, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits.operands),
            grid=(L.sequences, L.K, visits.count),
            in_specs=[spec.queries, spec.keys, spec.keys, spec.runs, spec.prefix, spec.prefix],
            out_specs=[spec.queries, spec.rows],
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
        compiler_params=common.compiler_params(),
        interpret=interpret,
        name="attention_forward",
    )(*visits.operands, *arrays)


def _kernel(options, layout, visits, *refs):
    """One tile.

    Scratch: `top`, the largest score so far, equal in all lanes; `total`, the sum of the powers, of
    which each lane holds the part of its own keys; `acc`, their product with the values.
    """
    *operands, q, k, v, runs, prefix_k, prefix_v, out, lse, top, total, acc = refs
    visit = visits.visit(layout, operands, pl.program_id(0), pl.program_id(2))

    def take(k, v, seen):
        # In chunks, so that products and powers of different ones can overlap.
        for keys in common.chunks(k.shape[0], CHUNK):
            s, _ = cap(options, product(q[...], k[keys], (1, 1)))
            if seen is not None:
                s = jnp.where(seen(keys), s, -jnp.inf)
            old = top[...]
            new = jnp.maximum(old, jnp.max(s, 1, keepdims=True))
            p = jnp.exp2(s - spread(new, s.shape[1]))
            fade = jnp.exp2(old - new)
            sums = sum(p[:, n] for n in common.chunks(p.shape[1], LANES))
            top[...] = new
            total[...] = total[...] * fade + sums
            values = product(p.astype(v.dtype), v[keys], (1, 0))
            acc[...] = acc[...] * spread(fade, layout.h) + values

    @pl.when(visit.is_first)
    def _():
        top[...] = jnp.full(top.shape, LOWEST)
        total[...] = jnp.zeros(total.shape)
        acc[...] = jnp.zeros(acc.shape)
        if layout.M:
            take(prefix_k, prefix_v, functools.partial(common.is_slot, layout))

    common.by_kind(layout, visit, runs, 0, functools.partial(take, k, v))

    @pl.when(visit.is_last)
    def _():
        sums = jnp.sum(total[...], 1, keepdims=True)
        sees = sums > 0.0
        sums = jnp.where(sees, sums, 1.0)
        out[...] = (acc[...] / sums).astype(out.dtype)
        # Along the lanes, where a number takes no more than its own place.
        log = (top[...] + jnp.log2(sums)) * math.log(2)
        lse[...] = jnp.where(sees, log, -jnp.inf).T[:1]
