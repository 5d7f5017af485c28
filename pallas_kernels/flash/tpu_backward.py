"""The backward kernels for TPU: gradients of queries, of keys and values, of the prefix.

Each computes the probabilities of a tile again, from the log-sum-exp. With p = exp(s - lse),
dp = dout v^T and delta = sum(out dout) - dlse, the gradient of a score is p (dp - delta).
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.flash import tpu_common as common
from pallas_kernels.flash.tpu_common import Visits, cap, product, spread
from pallas_kernels.flash.tpu_layout import LANES, Layout

CHUNK = 512  # keys, or rows, of the products of a tile that are in flight at once


def query_gradients(options, layout: Layout, visits: Visits, arrays, dout, lse, delta, interpret):
    """The gradient of q, like q.

    Args:
      visits: of the kinds of blocks [I, J].
      arrays: q, k, v, runs or None, prefix keys and values or None, folded as in `tpu_common`.
      dout: like q.
      lse: float32 `[sequences, K, I, 1, rows]`, in units of ln 2, and huge for a query that sees
        nothing.
      delta: like `lse`.
    """
    L = layout
    q, *_ = arrays
    spec = common.specs(L, visits)
    return pl.pallas_call(
        functools.partial(_query_kernel, options, layout, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits.operands),
            grid=(L.sequences, L.K, visits.count),
            in_specs=[
                *(spec.queries, spec.keys, spec.keys, spec.runs, spec.prefix, spec.prefix),
                *(spec.queries, spec.rows, spec.rows),
            ],
            out_specs=spec.queries,
            scratch_shapes=[
                pltpu.VMEM((L.rows, LANES), jnp.float32),
                pltpu.VMEM((L.rows, LANES), jnp.float32),
                pltpu.VMEM((L.rows, L.h), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=common.compiler_params(),
        interpret=interpret,
        name="attention_query_gradients",
    )(*visits.operands, *arrays, dout, lse, delta)


def _query_kernel(options, layout, visits, *refs):
    """One tile; scratch: `top` and `mean`, lse and delta in all lanes; `acc`, the gradient."""
    *operands, q, k, v, runs, prefix_k, prefix_v, dout, lse, delta, dq, top, mean, acc = refs
    visit = visits.visit(layout, operands, pl.program_id(0), pl.program_id(2))

    def take(k, v, seen):
        for keys in common.chunks(k.shape[0], CHUNK):
            s = product(q[...], k[keys], (1, 1))
            dp = product(dout[...], v[keys], (1, 1))
            lanes = s.shape[1]
            visible = None if seen is None else seen(keys)
            _, ds = _of_scores(
                options, s, dp, visible, spread(top[...], lanes), spread(mean[...], lanes)
            )
            acc[...] += product(ds.astype(k.dtype), k[keys], (1, 0))

    @pl.when(visit.is_first)
    def _():
        top[...] = jnp.broadcast_to(lse[...], (LANES, layout.rows)).T
        mean[...] = jnp.broadcast_to(delta[...], (LANES, layout.rows)).T
        acc[...] = jnp.zeros(acc.shape)
        if layout.M:
            take(prefix_k, prefix_v, functools.partial(common.is_slot, layout))

    common.by_kind(layout, visit, runs, 0, functools.partial(take, k, v))

    @pl.when(visit.is_last)
    def _():
        dq[...] = (acc[...] * options.scale).astype(dq.dtype)


def key_gradients(options, layout: Layout, visits: Visits, arrays, dout, lse, delta, interpret):
    """The gradients of k and v, like k.

    Args:
      visits: of the kinds of blocks, `by_keys`.
      arrays: q, k, v, and runs `[masks, keys, ends]` or None.
      dout, lse, delta: as for `query_gradients`.
    """
    L = layout
    _, k, *_ = arrays
    spec = common.specs(L, visits)
    return pl.pallas_call(
        functools.partial(_key_kernel, options, layout, visits),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits.operands),
            grid=(L.sequences, L.K, visits.count),
            in_specs=[
                *(spec.queries, spec.keys, spec.keys, spec.runs),
                *(spec.queries, spec.rows, spec.rows),
            ],
            out_specs=[spec.keys, spec.keys],
            scratch_shapes=[pltpu.VMEM((L.block_k, L.h), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype)] * 2,
        compiler_params=common.compiler_params(),
        interpret=interpret,
        name="attention_key_gradients",
    )(*visits.operands, *arrays, dout, lse, delta)


def _key_kernel(options, layout, visits, *refs):
    *operands, q, k, v, runs, dout, lse, delta, dk, dv, acc_k, acc_v = refs
    visit = visits.visit(layout, operands, pl.program_id(0), pl.program_id(2))
    take = functools.partial(_add_to_keys, options, q, k, v, dout, lse, delta, acc_k, acc_v)

    @pl.when(visit.is_first)
    def _():
        acc_k[...] = jnp.zeros(acc_k.shape)
        acc_v[...] = jnp.zeros(acc_v.shape)

    common.by_kind(layout, visit, runs, 1, take)

    @pl.when(visit.is_last)
    def _():
        dk[...] = (acc_k[...] * options.scale).astype(dk.dtype)
        dv[...] = acc_v[...].astype(dv.dtype)


def prefix_gradients(options, layout: Layout, arrays, dout, lse, delta, interpret):
    """The gradients of the prefix's keys and values, float32 `[P, K, slots, h]`.

    Args:
      arrays: q, prefix keys and values.
      dout, lse, delta: as for `query_gradients`.
    """
    L = layout
    _, prefix_k, _ = arrays

    def sequence(p, step):
        return lax.div(step, L.q_blocks) * L.P + p

    queries = pl.BlockSpec(
        (None, None, L.rows, L.h),
        lambda p, head, step: (sequence(p, step), head, lax.rem(step, L.q_blocks), 0),
    )
    rows = pl.BlockSpec(
        (None, None, None, 1, L.rows),
        lambda p, head, step: (sequence(p, step), head, lax.rem(step, L.q_blocks), 0, 0),
    )
    slots = pl.BlockSpec((None, None, L.slots, L.h), lambda p, head, step: (p, head, 0, 0))
    return pl.pallas_call(
        functools.partial(_prefix_kernel, options),
        grid=(L.P, L.K, L.sequences // L.P * L.q_blocks),
        in_specs=[queries, slots, slots, queries, rows, rows],
        out_specs=[slots, slots],
        out_shape=[jax.ShapeDtypeStruct(prefix_k.shape, jnp.float32)] * 2,
        compiler_params=common.compiler_params(),
        interpret=interpret,
        name="attention_prefix_gradients",
    )(*arrays, dout, lse, delta)


def _prefix_kernel(options, q, k, v, dout, lse, delta, dk, dv):
    @pl.when(pl.program_id(2) == 0)
    def _():
        dk[...] = jnp.zeros(dk.shape)
        dv[...] = jnp.zeros(dv.shape)

    # What padded slots would get is cut off outside.
    _add_to_keys(options, q, k, v, dout, lse, delta, dk, dv, None)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        dk[...] *= options.scale


def _add_to_keys(options, q, k, v, dout, lse, delta, acc_k, acc_v, seen):
    """Adds what a tile of queries gives; scores are [keys, rows]: lse then lies along the lanes."""
    for keys in common.chunks(k.shape[0], CHUNK):
        s = product(k[keys], q[...], (1, 1))
        dp = product(v[keys], dout[...], (1, 1))
        visible = None if seen is None else seen(keys)
        p, ds = _of_scores(options, s, dp, visible, lse[...], delta[...])
        acc_v[keys] += product(p.astype(dout.dtype), dout[...], (1, 0))
        acc_k[keys] += product(ds.astype(q.dtype), q[...], (1, 0))


def _of_scores(options, s, dp, visible, lse, delta):
    """Probabilities, and the gradient of the scores before they are scaled, but for the scale."""
    s, tanh = cap(options, s)
    # What lies in a hidden place, NaN or infinite perhaps, is replaced after each product.
    if visible is not None:
        s = jnp.where(visible, s, -jnp.inf)
    p = jnp.exp2(s - lse)
    ds = p * (dp - delta)
    if tanh is not None:
        ds *= 1.0 - tanh * tanh
    if visible is not None:
        ds = jnp.where(visible, ds, 0.0)
    return p, ds
