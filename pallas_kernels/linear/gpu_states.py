"""The kernel of the states: the recurrence over chunks, forwards or backwards in time.

    X = values + f * (w S^T)    (of a chunk; only where the recurrence has the delta rule)
    S' = keep * S + again + (g * X)^T keys + (g2 * values2)^T keys2

f, g and g2 have a number for each token, `keep` one for each column. A program holds 64 rows of S,
which is `[hv, hk]`: the transpose of what the op calls a state.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.linear import gpu_tiles as tiles
from pallas_kernels.linear.gpu_tiles import ROWS, SHARED_MEMORY, Vectors

MAX_STAGES = 4


class StateInputs(NamedTuple):
    """Arrays with padded axes; b runs over N and P.

    Attributes:
      keys, values: `[b, T, K or H, hk]` and `[b, T, H, hv]`.
      factors: "written" (g), "solved" (f) and "more" (g2), those that are needed.
      keep: float32 `[b, H n, hk]`, for each chunk.
      start: float32, S at the first chunk, `[b or P, H hv, hk]`; None: zero.
      again: float32 `[b, H n, hk]`, and `[P, H hv, hk]` in the type of `values`: factors and a
        state, whose product each chunk adds; or None.
      solve: w, `[b, T, K or H, hk]`, or None.
      more: keys2 and values2, or None.
    """

    keys: Float[Array, "b T K hk"]
    values: Float[Array, "b T H hv"]
    factors: Vectors | None
    keep: Float[Array, "b Hn hk"]
    start: Float[Array, "b Hhv hk"] | None = None
    again: tuple[Array, Array] | None = None
    solve: Float[Array, "b T K hk"] | None = None
    more: tuple[Array, Array] | None = None


def call(inputs: StateInputs, streams: int, reverse: bool = False):
    """The states before each chunk (after it, if `reverse`) in the type of `values`, `[b, H n, hv,
    hk]`, the last one in float32 `[b, H hv, hk]`, and with `solve` X, like `values`.

    Args:
      streams: P.
      reverse: from the last chunk to the first.
    """
    (b, T, H, hv), hk = inputs.values.shape, inputs.keys.shape[-1]
    dtype, n = inputs.values.dtype, inputs.keep.shape[1] // H
    per = T // (n * ROWS)
    names = tiles.names_of(inputs.factors)
    solves, adds = inputs.solve is not None, inputs.more is not None

    fixed = {
        "S": tiles.shared((ROWS, hk), dtype),
        "written": tiles.shared((2, ROWS, ROWS), dtype),
    }
    if solves:
        fixed["X"] = tiles.shared((ROWS, ROWS), dtype)
    if adds:
        fixed["more"] = tiles.shared((2, ROWS, ROWS), dtype)
    if inputs.again is not None:
        fixed["again"] = tiles.shared((ROWS, hk), dtype)

    def ring(stages):
        memory = {
            "keys": tiles.shared((stages, ROWS, hk), dtype),
            "values": tiles.shared((stages, ROWS, ROWS), dtype),
            "keep": plgpu.SMEM((stages, hk), jnp.float32),
        }
        if names:
            memory["factors"] = plgpu.SMEM((stages, len(names), ROWS), jnp.float32)
        if solves:
            memory["solve"] = tiles.shared((stages, ROWS, hk), dtype)
        if adds:
            memory["more_keys"] = tiles.shared((stages, ROWS, hk), dtype)
            memory["more_values"] = tiles.shared((stages, ROWS, ROWS), dtype)
        if inputs.again is not None:
            memory["again_factor"] = plgpu.SMEM((stages, hk), jnp.float32)
        return memory

    stages = tiles.most_stages(SHARED_MEMORY, fixed, ring(1), MAX_STAGES)
    if not stages:
        raise ValueError(f"{hk} x {hv} is too large a state for shared memory")

    def entry(x, batch):
        return batch if x.shape[0] == b else lax.rem(batch, streams)

    def program(operands, outs, memory):
        batch, head, part = (lax.axis_index(name) for name in ("batch", "head", "block"))
        place = tiles.ds(head * hv + part * ROWS)

        def in_time(index, count):
            return count - 1 - index if reverse else index

        def copies(step):
            rows = tiles.ds(in_time(step, n * per) * ROWS)
            chunk = head * n + in_time(lax.div(step, per), n)
            key = lambda x: x.at[batch, rows, tiles.head_of(x, head, H)]
            value = lambda x: x.at[batch, rows, head, tiles.ds(part * ROWS)]
            yield "keys", key(operands.keys)
            yield "values", value(operands.values)
            if names:
                yield "factors", operands.factors.array.at[batch, head, :, rows]
            yield "keep", operands.keep.at[batch, chunk]
            if solves:
                yield "solve", key(operands.solve)
            if adds:
                yield "more_keys", key(operands.more[0])
                yield "more_values", value(operands.more[1])
            if operands.again is not None:
                yield "again_factor", operands.again[0].at[batch, chunk]

        visits = tiles.Ring(memory, copies, n * per)
        visits.start()

        def rows_of(x):
            return x.at[entry(x, batch), place]

        if operands.start is None:
            S = tiles.filled((ROWS, hk), 0.0, tiles.MATRIX)
        else:
            S = tiles.fetched(rows_of(operands.start))
        if operands.again is not None:
            source = rows_of(operands.again[1])
            plgpu.copy_gmem_to_smem(source, memory["again"], memory["again_ready"])
            plgpu.barrier_wait(memory["again_ready"])

        def chunk(c, S):
            step = c * per
            visits.wait(step)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            memory["S"][...] = S.astype(dtype)
            plgpu.commit_smem()
            index = head * n + in_time(c, n)
            plgpu.copy_smem_to_gmem(
                memory["S"], outs["states"].at[batch, index, tiles.ds(part * ROWS)]
            )
            column = lambda name: tiles.laid_out(visits.at(name, step)[...], tiles.PER_COLUMN)
            S = S * tiles.spread(column("keep"), S.shape, 1)
            if operands.again is not None:
                factor = tiles.spread(column("again_factor"), S.shape, 1)
                S = S + factor * tiles.loaded(memory["again"])
            S = tile(step, S)
            return lax.fori_loop(step + 1, step + per, tile_after, S) if per > 1 else S

        def tile_after(step, S):
            visits.wait(step)
            return tile(step, S)

        def tile(step, S):
            def times(x, name):
                """x, or x times the factor of that name, if there is one."""
                if name not in names:
                    return x
                row = visits.at("factors", step).at[names.index(name)]
                return x * tiles.spread(tiles.laid_out(row[...], tiles.PER_ROW), x.shape, 0)

            x = tiles.loaded(visits.at("values", step))
            if solves:
                zero = tiles.filled((ROWS, ROWS), 0.0, tiles.MATRIX)
                found = tiles.multiply(zero, (visits.at("solve", step), tiles.turned(memory["S"])))
                x = x + times(found, "solved")
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                memory["X"][...] = x.astype(dtype)
            # In turns: another warp may still multiply what was written a step ago.
            written = memory["written"].at[lax.rem(step, 2)]
            written[...] = times(x, "written").astype(dtype)
            pairs = [(tiles.turned(written), visits.at("keys", step))]
            if adds:
                more = memory["more"].at[lax.rem(step, 2)]
                values = tiles.loaded(visits.at("more_values", step))
                more[...] = times(values, "more").astype(dtype)
                pairs.append((tiles.turned(more), visits.at("more_keys", step)))
            plgpu.commit_smem()
            if solves:
                rows = tiles.ds(in_time(step, n * per) * ROWS)
                target = outs["X"].at[batch, rows, head, tiles.ds(part * ROWS)]
                plgpu.copy_smem_to_gmem(memory["X"], target)
            if stages > 1:
                # All threads have met since the last step's products, which are done.
                pl.when(step > 0)(lambda: visits.refill(step - 1))
            S = tiles.multiply(S, *pairs)
            if stages == 1:
                plgpu.commit_smem()
                visits.refill(step)
            return S

        outs["end"].at[batch, place][...] = lax.fori_loop(0, n, chunk, S)
        plgpu.wait_smem_to_gmem(0)

    shapes = {
        "states": jax.ShapeDtypeStruct((b, H * n, hv, hk), dtype),
        "end": jax.ShapeDtypeStruct((b, H * hv, hk), jnp.float32),
    }
    if solves:
        shapes["X"] = jax.ShapeDtypeStruct(inputs.values.shape, dtype)
    scratch = {**fixed, **ring(stages)}
    if inputs.again is not None:
        scratch["again_ready"] = plgpu.Barrier()
    scratch["ready"] = plgpu.Barrier(num_arrivals=len(ring(1)), num_barriers=stages)
    name = "linear_dstates" if reverse else "linear_states"
    return tiles.run(name, program, shapes, scratch, (b, H, hv // ROWS), inputs)
