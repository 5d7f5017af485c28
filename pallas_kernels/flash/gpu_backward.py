"""The backward kernels: one for queries, one for keys and values.

Both compute the probabilities p of a tile again, from the log-sum-exp of the forward pass. With
o = sum p v, the gradient of a score is p (dp - delta): dp the product of do and v, delta the sum of
o do less the gradient of the log-sum-exp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash import gpu_keys
from pallas_kernels.flash import gpu_tiles as tiles
from pallas_kernels.flash.gpu_keys import Static, Visits
from pallas_kernels.flash.gpu_tiles import BLOCK, ROWS, WARPGROUPS
from pallas_kernels.flash.options import Options
from pallas_kernels.masks.blocks import PARTIAL


class Queries(NamedTuple):
    """Arrays with padded axes.

    Attributes:
      q, dout: `[N P, T, H, h]`.
      lse: float32 `[N P, H, T]`, in units of log(2); finite in the padding.
      delta: float32 `[N P, H, T]`.
    """

    q: Float[Array, "b T H h"]
    dout: Float[Array, "b T H h"]
    lse: Float[Array, "b H T"]
    delta: Float[Array, "b H T"]


def queries_gradient(options: Options, static: Static, queries: Queries, inputs: gpu_keys.Inputs):
    """dq, like q. A program for each block of queries, as in the forward kernel."""
    NP, T, H, h = queries.q.shape
    dtype = queries.q.dtype

    def gradient(mine, ring, first):
        lse = tiles.laid_out(mine["lse"][...], tiles.PER_ROW)
        delta = tiles.laid_out(mine["delta"][...], tiles.PER_ROW)

        def step(hide, step, dq):
            ring.wait("k", step)
            ring.wait("v", step)
            k, v = ring.block("k", step), ring.block("v", step)
            raw, dp = tiles.multiply(
                tiles.Product(mine["q"], k, transposed=True),
                tiles.Product(mine["dout"], v, transposed=True),
            )
            ring.release("v", step)
            x, unit = tiles.scores(options, raw)
            p = jnp.exp2(x * unit - tiles.spread(lse, x.shape, 0))
            ds = p * (dp - tiles.spread(delta, x.shape, 0))
            ds = hide(tiles.score_gradient(options, x, ds), 0.0, first)
            (dq,) = tiles.multiply(tiles.Product(ds.astype(dtype), k, dq))
            ring.release("k", step)
            return dq

        return ring.loop(step, tiles.filled((ROWS, h), 0.0, tiles.MATRIX)) * options.scale

    def program(operands, outs, memory):
        b, head = lax.axis_index("batch"), lax.axis_index("head")
        i = T // BLOCK - 1 - lax.axis_index("block")
        queries, inputs = operands
        ring = gpu_keys.Ring(static, inputs, memory, b, head, i)

        def compute(warpgroup):
            first = i * BLOCK + warpgroup * ROWS
            rows = pl.ds(first, ROWS)
            mine = {name: memory[name].at[warpgroup] for name in Queries._fields}
            loaded = memory["queries_ready"].at[warpgroup]
            for name, index in _query_indices(b, head, rows).items():
                plgpu.copy_gmem_to_smem(getattr(queries, name).at[index], mine[name], loaded)
            plgpu.barrier_wait(loaded)
            dq = gradient(mine, ring, first)
            mine["q"][...] = dq.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(mine["q"], outs[0].at[b, rows, head])
            plgpu.wait_smem_to_gmem(0)

        tiles.share_work(ring.fill, compute)

    scratch = {
        **_query_memory(WARPGROUPS, ROWS, h, dtype),
        "queries_ready": plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
        **gpu_keys.scratch(static, inputs),
    }
    outs = [jax.ShapeDtypeStruct(queries.q.shape, dtype)]
    (dq,) = tiles.run(
        "attention_dq", program, outs, scratch, (NP, H, T // BLOCK), (queries, inputs)
    )
    return dq


class KeyInputs(NamedTuple):
    """Arrays with padded axes.

    Attributes:
      k, v: `[N P, S, K, h]`; of a prefix `[P, M, K, h]`.
      visits: of blocks of queries for each block of `BLOCK` keys.
      runs: for each group of `ROWS` keys, or None.
    """

    k: Float[Array, "b S K h"]
    v: Float[Array, "b S K h"]
    visits: Visits
    runs: Int[Array, "m groups ends rows"] | None


def keys_gradient(
    options: Options, static: Static, block_q: int, queries: Queries, inputs: KeyInputs
):
    """dk and dv, `[N P, S, K, h]`. A program for each block of keys, over all heads of its group.

    The tiles are transposed: rows are keys, columns queries.

    Args:
      static: `stages` counts blocks of queries; `block_k` is not used.
      block_q: queries in a block.
    """
    (NP, _, _, h), (entries, S, K, _) = queries.q.shape, inputs.k.shape
    dtype = queries.q.dtype
    stages = static.stages

    def at(memory, name, step):
        return memory[name].at[lax.rem(step, stages)]

    def fill(queries, visit, memory, b, head_k, steps):
        def copy(step, _):
            g, row, _ = visit(step)
            head, rows = head_k * static.group + g, pl.ds(row * block_q, block_q)
            indices = _query_indices(b, head, rows)
            for pair in (("q", "lse"), ("dout", "delta")):
                free, ready = (at(memory, f"{pair[0]}_{x}", step) for x in ("free", "ready"))
                pl.when(step >= stages)(lambda free=free: plgpu.barrier_wait(free))
                for name in pair:
                    source = getattr(queries, name).at[indices[name]]
                    plgpu.copy_gmem_to_smem(source, at(memory, name, step), ready)

        lax.fori_loop(0, steps, copy, None)

    def gradients(k_mine, v_mine, runs, visit, memory, first, steps):
        def release(name, step):
            @pl.when(step + stages < steps)
            def _():
                plgpu.barrier_arrive(at(memory, f"{name}_free", step))

        def vector(name, step):
            return tiles.laid_out(at(memory, name, step)[...], tiles.PER_COLUMN)

        def hide(p, row, kind):
            def hidden(p):
                t = tiles.positions(p.shape, 1, row * block_q)
                s = tiles.positions(p.shape, 0, first)
                ends = [tiles.spread(end, p.shape, 0) for end in runs]
                seen = tiles.visible(t, s, ends, static.keys, static.causal, static.dilation)
                return jnp.where(seen, p, 0.0)

            return lax.cond(kind == PARTIAL, hidden, lambda p: p, p)

        def step(step, carry):
            dk, dv = carry
            _, row, kind = visit(step)
            plgpu.barrier_wait(at(memory, "q_ready", step))
            q, dout = at(memory, "q", step), at(memory, "dout", step)
            (raw,) = tiles.multiply(tiles.Product(k_mine, q, transposed=True))
            x, unit = tiles.scores(options, raw)
            p = jnp.exp2(x * unit - tiles.spread(vector("lse", step), x.shape, 1))
            p = hide(p, row, kind)
            plgpu.barrier_wait(at(memory, "dout_ready", step))
            (dv,) = tiles.multiply(tiles.Product(p.astype(dtype), dout, dv))
            (dp,) = tiles.multiply(tiles.Product(v_mine, dout, transposed=True))
            ds = p * (dp - tiles.spread(vector("delta", step), x.shape, 1))
            release("dout", step)
            # Of a hidden pair, p = 0 may have met an infinite dp.
            ds = hide(tiles.score_gradient(options, x, ds), row, kind)
            (dk,) = tiles.multiply(tiles.Product(ds.astype(dtype), q, dk))
            release("q", step)
            return dk, dv

        zero = tiles.filled((ROWS, h), 0.0, tiles.MATRIX)
        dk, dv = lax.fori_loop(0, steps, step, (zero, zero))
        return dk * options.scale, dv

    def program(operands, outs, memory):
        b, head_k, j = (lax.axis_index(name) for name in ("batch", "head", "block"))
        queries, inputs = operands
        m, entry = static.mask_entry(b), static.stream(b) if entries < NP else b
        count = inputs.visits.counts[m, j]

        def visit(step):
            code = inputs.visits.codes[m, j, lax.rem(step, count)]
            return lax.div(step, count), lax.div(code, 4), lax.rem(code, 4)

        steps = count * static.group

        def compute(warpgroup):
            first = j * BLOCK + warpgroup * ROWS
            rows = pl.ds(first, ROWS)
            k_mine, v_mine = memory["k"].at[warpgroup], memory["v"].at[warpgroup]
            loaded = memory["keys_ready"].at[warpgroup]
            plgpu.copy_gmem_to_smem(inputs.k.at[entry, rows, head_k], k_mine, loaded)
            plgpu.copy_gmem_to_smem(inputs.v.at[entry, rows, head_k], v_mine, loaded)
            runs = []
            if inputs.runs is not None:
                source = inputs.runs.at[m, j * WARPGROUPS + warpgroup]
                mine = memory["runs"].at[warpgroup]
                plgpu.copy_gmem_to_smem(source, mine, loaded)
            plgpu.barrier_wait(loaded)
            if inputs.runs is not None:
                runs = [tiles.laid_out(mine[r], tiles.PER_ROW) for r in range(mine.shape[0])]
            dk, dv = gradients(k_mine, v_mine, runs, visit, memory, first, steps)
            k_mine[...] = dk.astype(dtype)
            v_mine[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_mine, outs[0].at[b, rows, head_k])
            plgpu.copy_smem_to_gmem(v_mine, outs[1].at[b, rows, head_k])
            plgpu.wait_smem_to_gmem(0)

        tiles.share_work(lambda: fill(queries, visit, memory, b, head_k, steps), compute)

    scratch = {
        "k": tiles.shared((WARPGROUPS, ROWS, h), dtype),
        "v": tiles.shared((WARPGROUPS, ROWS, h), dtype),
        "keys_ready": plgpu.Barrier(
            num_arrivals=2 + (inputs.runs is not None), num_barriers=WARPGROUPS
        ),
        **_query_memory(stages, block_q, h, dtype),
        "q_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "dout_ready": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "q_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "dout_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    if inputs.runs is not None:
        scratch["runs"] = plgpu.SMEM((WARPGROUPS, *inputs.runs.shape[2:]), jnp.int32)
    outs = [jax.ShapeDtypeStruct((NP, S, K, h), dtype)] * 2
    return tiles.run(
        "attention_dkv", program, outs, scratch, (NP, K, S // BLOCK), (queries, inputs)
    )


def _query_indices(b, head, rows):
    return {
        "q": (b, rows, head),
        "dout": (b, rows, head),
        "lse": (b, head, rows),
        "delta": (b, head, rows),
    }


def _query_memory(count, rows, h, dtype):
    return {
        "q": tiles.shared((count, rows, h), dtype),
        "dout": tiles.shared((count, rows, h), dtype),
        "lse": plgpu.SMEM((count, rows), jnp.float32),
        "delta": plgpu.SMEM((count, rows), jnp.float32),
    }
