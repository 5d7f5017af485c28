"""The forward kernel: one program for each block of queries of a head.

Two warpgroups hold 64 queries each and go through the blocks of keys that the mask leaves; a third
one copies keys and values ahead of them, through a ring of slots in shared memory.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import gpu_tiles as tiles
from pallas_kernels.flash.gpu_tiles import BLOCK, ROWS, WARPGROUPS, Keys, Static, Visits
from pallas_kernels.flash.options import Options


def call(options: Options, static: Static, slots: int, q, keys: Keys, visits: Visits):
    """Attention of arrays with padded axes.

    Args:
      slots: how many blocks of keys are in shared memory at a time.
      q: `[N P, T, H, h]`, T a multiple of `BLOCK`.
      visits: lists of the blocks of keys for blocks of `BLOCK` queries.

    Returns:
      the output, like q, and float32 log-sum-exp `[N P, H, T]`.
    """
    NP, T, H, h = q.shape

    def program(inputs, outs, memory):
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        # The last blocks of queries see the most keys under a causal mask: they start first.
        i = T // BLOCK - 1 - lax.axis_index("block")
        ring = tiles.KeyRing(static, slots, inputs["keys"], inputs["visits"], memory, b, head, i)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def _copy():
            plgpu.set_max_registers(24, action="decrease")
            ring.fill(H)

        @pl.when(warpgroup < WARPGROUPS)
        def _compute():
            plgpu.set_max_registers(240, action="increase")
            first = i * BLOCK + warpgroup * ROWS
            rows = pl.ds(first, ROWS)
            mine, lse_mine = memory["q"].at[warpgroup], memory["lse"].at[warpgroup]
            loaded = memory["q_ready"].at[warpgroup]
            plgpu.copy_gmem_to_smem(inputs["q"].at[b, rows, head], mine, loaded)
            plgpu.barrier_wait(loaded)
            out, lse = attend(mine, ring, first)
            mine[...] = out.astype(q.dtype)
            lse_mine[...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, outs[0].at[b, rows, head])
            plgpu.copy_smem_to_gmem(lse_mine, outs[1].at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)

    def attend(mine, ring, first):
        """Output and log-sum-exp of 64 queries."""

        def step(step, carry):
            sums, total, top = carry
            ring.wait("k", step)
            raw = tiles.product(mine, ring.block("k", step))
            x, unit = tiles.scores(options, raw)
            x = ring.hide(x, step, first)
            ring.release("k", step)
            new_top = jnp.maximum(top, jnp.max(x, 1) * unit)
            # Where nothing was seen yet, exp2(-inf - 0) = 0.
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp2(x * unit - tiles.spread(base, x.shape, 0))
            shrink = jnp.exp2(top - base)
            total = total * shrink + jnp.sum(p, 1)
            sums = sums * tiles.spread(shrink, sums.shape, 0)
            ring.wait("v", step)
            sums = tiles.add_product(sums, p.astype(q.dtype), ring.block("v", step))
            ring.release("v", step)
            return sums, total, new_top

        start = (
            tiles.full((ROWS, h), 0.0, tiles.MATRIX),
            tiles.full((ROWS,), 0.0, tiles.PER_ROW),
            tiles.full((ROWS,), -jnp.inf, tiles.PER_ROW),
        )
        sums, total, top = lax.fori_loop(0, ring.steps, step, start)
        sees = total > 0.0
        total = jnp.where(sees, total, 1.0)
        lse = jnp.where(sees, top * math.log(2) + jnp.log(total), -jnp.inf)
        return sums * tiles.spread(1.0 / total, sums.shape, 0), lse

    outs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((NP, H, T), jnp.float32),
    ]
    scratch = {
        "q": tiles.tile((WARPGROUPS, ROWS, h), q.dtype),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS),
    } | tiles.key_ring_scratch(slots, keys, visits)
    operands = {"q": q, "keys": keys, "visits": visits}
    return tiles.grid_call(program, outs, scratch, (NP, H, T // BLOCK), operands)
