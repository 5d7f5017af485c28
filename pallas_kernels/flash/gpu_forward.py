"""The forward kernel: one program for each block of queries of a head.

Two warpgroups hold 64 queries each and go through the blocks of keys that the mask leaves, with
the softmax of what they have seen so far; a third one copies keys and values ahead of them.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.flash import gpu_keys
from pallas_kernels.flash import gpu_tiles as tiles
from pallas_kernels.flash.gpu_keys import Inputs, Static
from pallas_kernels.flash.gpu_tiles import BLOCK, ROWS, WARPGROUPS
from pallas_kernels.flash.options import Options


def take_turns(turn, warpgroup):
    """Lets one warpgroup use the tensor cores while the other one computes the softmax.

    Returns:
      a function that both call twice in each step, where the tensor cores have got what they need
      and where it needs them again; and one to call before (0) and after (1) all steps, so that
      one warpgroup is half a step behind.
    """

    def meet():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    return meet, lambda is_after: pl.when(warpgroup == 1 - is_after)(meet)


def call(options: Options, static: Static, q, inputs: Inputs):
    """Output, like q `[N P, T, H, h]`, and float32 log-sum-exp `[N P, H, T]`; axes padded."""
    NP, T, H, h = q.shape

    def attend(mine, ring, first, meet):
        """Output and log-sum-exp of 64 queries."""

        def step(hide, step, carry):
            sums, total, top = carry
            ring.wait("k", step)
            q_k = tiles.Product(mine, ring.block("k", step), transposed=True)
            (raw,) = tiles.multiply(q_k, meanwhile=meet)
            x, unit = tiles.scores(options, raw)
            x = hide(x, -jnp.inf, first)
            ring.release("k", step)
            new_top = jnp.maximum(top, jnp.max(x, 1) * unit)
            # While nothing was seen, 0 makes exp2(-inf - 0) of all that would be NaN.
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            p = jnp.exp2(x * unit - tiles.spread(base, x.shape, 0))
            shrink = jnp.exp2(top - base)
            total = total * shrink + jnp.sum(p, 1)
            sums = sums * tiles.spread(shrink, sums.shape, 0)
            ring.wait("v", step)
            meet()
            p_v = tiles.Product(p.astype(q.dtype), ring.block("v", step), sums)
            (sums,) = tiles.multiply(p_v)
            ring.release("v", step)
            return sums, total, new_top

        start = (
            tiles.filled((ROWS, h), 0.0, tiles.MATRIX),
            tiles.filled((ROWS,), 0.0, tiles.PER_ROW),
            tiles.filled((ROWS,), -jnp.inf, tiles.PER_ROW),
        )
        sums, total, top = ring.loop(step, start)
        sees = total > 0.0
        total = jnp.where(sees, total, 1.0)
        lse = jnp.where(sees, top * math.log(2) + jnp.log(total), -jnp.inf)
        return sums * tiles.spread(1.0 / total, sums.shape, 0), lse

    def program(operands, outs, memory):
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        # The last blocks of queries see the most keys under a causal mask: they start first.
        i = T // BLOCK - 1 - lax.axis_index("block")
        q_ref, inputs = operands
        ring = gpu_keys.Ring(static, inputs, memory, b, head, i)

        def compute(warpgroup):
            first = i * BLOCK + warpgroup * ROWS
            rows = pl.ds(first, ROWS)
            mine, loaded = memory["q"].at[warpgroup], memory["q_ready"].at[warpgroup]
            plgpu.copy_gmem_to_smem(q_ref.at[b, rows, head], mine, loaded)
            plgpu.barrier_wait(loaded)
            meet, shift = take_turns(memory["turn"], warpgroup)
            shift(0)
            out, lse = attend(mine, ring, first, meet)
            shift(1)
            mine[...] = out.astype(q.dtype)
            lse_mine = memory["lse"].at[warpgroup]
            lse_mine[...] = lse
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine, outs[0].at[b, rows, head])
            plgpu.copy_smem_to_gmem(lse_mine, outs[1].at[b, head, rows])
            plgpu.wait_smem_to_gmem(0)

        tiles.share_work(ring.fill, compute)

    outs = [
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        jax.ShapeDtypeStruct((NP, H, T), jnp.float32),
    ]
    scratch = {
        "q": tiles.shared((WARPGROUPS, ROWS, h), q.dtype),
        "lse": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=WARPGROUPS),
        "turn": plgpu.Barrier(num_arrivals=WARPGROUPS),
        **gpu_keys.scratch(static, inputs),
    }
    return tiles.run("attention_forward", program, outs, scratch, (NP, H, T // BLOCK), (q, inputs))
