"""The kernel of the outputs: for each token a sum over the tokens of its chunk, and the states.

    o_i = sum_s f_si (q_i S_s^T) + scale sum_j exp(a_i - b_j) (q_i k_j + c) v_j

over j up to i, or, if `reverse`, from i on, with exp(b_j - a_i), so that the same kernel computes
outputs and gradients of queries, keys and values. A program has 64 tokens i and goes through the
tiles of their chunk, so that no chunk is too long for it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.linear import gpu_tiles as tiles
from pallas_kernels.linear.gpu_tiles import ROWS, Vectors


class OutputInputs(NamedTuple):
    """Arrays with padded axes; b runs over N and P.

    Attributes:
      q, k: `[b, T, K or H, x]`; v: `[b, T, K or H, y]`.
      own: of tokens i: "high" and "low" of a, perhaps "document", "bias" (c, for each i), and for
        each state its factor, "state" and "restart". With "before" and "floor" the output is
        divided by max(|before + sum of the factors of v|, floor).
      other: of tokens j: "high", "low", perhaps "document" and "bias".
      states: "state" `[b, H n, y, x]` and "restart" `[P, H, y, x]`, none, one or both; with the
        last axes swapped if `call` is told so.
      against: `[b, T, K or H, y]`, whose products with o_i are wanted; or None.
    """

    q: Float[Array, "b T K x"]
    k: Float[Array, "b T K x"]
    v: Float[Array, "b T K y"]
    own: Vectors
    other: Vectors
    states: dict[str, Array]
    against: Float[Array, "b T K y"] | None = None


def call(
    inputs: OutputInputs,
    heads: int,
    chunk: int,
    scale: float,
    memory: int,
    reverse: bool = False,
    swapped: bool = False,
):
    """The outputs, by name: "out", `[b, T, H, y]` in the type of q; and float32 `[b, H, T]`: "sums",
    what outputs are divided by but for `floor`, or, with `against`, its products with q_i S_s^T, by
    the name of the state, and with o_i, "against".

    Args:
      heads: H.
      chunk: tokens in a chunk.
      memory: bytes of shared memory of a program.
      swapped: states are `[.., x, y]`.
    """
    (b, T, _, x), y = inputs.q.shape, inputs.v.shape[-1]
    width = y if y <= 192 else 128
    parts, per, dtype, H = y // width, chunk // ROWS, inputs.q.dtype, heads
    others = len(inputs.states) * x * width + (1 + (inputs.against is not None)) * ROWS * width
    fixed = 2 * (ROWS * x + others) + 4096
    stages = min(2, per, (memory - fixed) // (2 * ROWS * (x + width) + 1024))
    own_names, other_names = inputs.own.names, inputs.other.names
    results = [*inputs.states, "against"] if inputs.against is not None else []
    results += ["sums"] if "floor" in own_names else []

    def program(operands, outs, memory):
        batch, unit, i = (lax.axis_index(name) for name in ("batch", "head", "block"))
        head, part = lax.div(unit, parts), lax.rem(unit, parts)
        c, place = lax.div(i, per), lax.rem(i, per)
        mine, columns = tiles.ds(i * ROWS), pl.ds(part * width, width)

        def tokens(array, rows, *index):
            return array.at[batch, rows, tiles.head_of(array, head, H), *index]

        def copies(step):
            j = i + step if reverse else i - step
            yield "k", tokens(operands.k, tiles.ds(j * ROWS))
            yield "v", tokens(operands.v, tiles.ds(j * ROWS), columns)
            yield "other", operands.other.array.at[batch, head, :, tiles.ds(j * ROWS)]

        def copy_own(name, source):
            plgpu.copy_gmem_to_smem(source, memory[name], memory["fetched"])

        copy_own("q", tokens(operands.q, mine))
        copy_own("own", operands.own.array.at[batch, head, :, mine])
        for name, array in operands.states.items():
            at = (
                (batch, head * (T // chunk) + c)
                if name == "state"
                else (lax.rem(batch, array.shape[0]), head)
            )
            copy_own(name, array.at[*at, :, columns] if swapped else array.at[*at, columns])
        if operands.against is not None:
            copy_own("against", tokens(operands.against, mine, columns))
        steps = per - place if reverse else place + 1
        ring = tiles.Ring(memory, copies, steps)
        ring.start()
        plgpu.barrier_wait(memory["fetched"])

        def own(name, shape=None):
            vector = tiles.laid_out(memory["own"].at[own_names.index(name)][...], tiles.PER_ROW)
            return vector if shape is None else tiles.spread(vector, shape, 0)

        def keep_vector(name, vector):
            memory["vectors"].at[results.index(name)][...] = vector

        out = tiles.filled((ROWS, width), 0.0, tiles.MATRIX)
        for name in operands.states:
            matrix = memory[name] if swapped else tiles.turned(memory[name])
            zero = tiles.filled((ROWS, width), 0.0, tiles.MATRIX)
            found = tiles.multiply(zero, (memory["q"], matrix))
            if operands.against is not None:
                keep_vector(name, jnp.sum(found * tiles.loaded(memory["against"]), 1))
            out = out + found * own(name, found.shape)

        def factors(step, is_first):
            """Of the v of a tile."""

            def other(name):
                vector = ring.at("other", step).at[other_names.index(name)]
                vector = tiles.laid_out(vector[...], tiles.PER_COLUMN)
                return tiles.spread(vector, shape, 1)

            shape = (ROWS, ROWS)
            zero = tiles.filled(shape, 0.0, tiles.MATRIX)
            raw = tiles.multiply(zero, (memory["q"], tiles.turned(ring.at("k", step))))
            if "bias" in own_names:
                raw = raw + own("bias", shape)
            if "bias" in other_names:
                raw = raw + other("bias")
            sign = -1.0 if reverse else 1.0
            apart = (own("high", shape) - other("high")) * sign
            fade = jnp.exp(apart + (own("low", shape) - other("low")) * sign) * scale
            seen = None
            if is_first:
                t, s = (tiles.positions(shape, axis, 0) for axis in (0, 1))
                seen = s >= t if reverse else s <= t
            if "document" in own_names:
                same = own("document", shape) == other("document")
                seen = same if seen is None else seen & same
            return raw * fade if seen is None else jnp.where(seen, raw * fade, 0.0)

        def add(step, is_first, carry):
            out, sums = carry
            ring.wait(step)
            weights = factors(step, is_first)
            if sums is not None:
                sums = sums + jnp.sum(weights, 1)
            out = tiles.multiply(out, (weights.astype(dtype), ring.at("v", step)))
            return out, sums

        def later(step, carry):
            carry = add(step, False, carry)
            plgpu.commit_smem()
            ring.refill(step)
            return carry

        sums = own("before") if "floor" in own_names else None
        carry = add(0, True, (out, sums))
        if per > 1:
            plgpu.commit_smem()
            ring.refill(0)
            carry = lax.fori_loop(1, steps, later, carry)
        out, sums = carry
        if sums is not None:
            keep_vector("sums", sums)
            out = out / tiles.spread(jnp.maximum(jnp.abs(sums), own("floor")), out.shape, 0)
        if operands.against is not None:
            keep_vector("against", jnp.sum(out * tiles.loaded(memory["against"]), 1))
        memory["out"][...] = out.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory["out"], outs["out"].at[batch, mine, head, columns])
        if results:
            plgpu.copy_smem_to_gmem(memory["vectors"], outs["vectors"].at[batch, unit, :, mine])
        plgpu.wait_smem_to_gmem(0)

    shapes = {"out": jax.ShapeDtypeStruct((b, T, H, y), dtype)}
    state = (x, width) if swapped else (width, x)
    scratch = {
        "q": tiles.shared((ROWS, x), dtype),
        "own": plgpu.SMEM((len(own_names), ROWS), jnp.float32),
        "k": tiles.shared((stages, ROWS, x), dtype),
        "v": tiles.shared((stages, ROWS, width), dtype),
        "other": plgpu.SMEM((stages, len(other_names), ROWS), jnp.float32),
        "out": tiles.shared((ROWS, width), dtype),
        "ready": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        **{name: tiles.shared(state, dtype) for name in inputs.states},
    }
    if results:
        vector_shape = (b, H * parts, len(results), T)
        shapes["vectors"] = jax.ShapeDtypeStruct(vector_shape, jnp.float32)
        scratch["vectors"] = plgpu.SMEM((len(results), ROWS), jnp.float32)
    if inputs.against is not None:
        scratch["against"] = tiles.shared((ROWS, width), dtype)
    copies = 2 + len(inputs.states) + (inputs.against is not None)
    scratch["fetched"] = plgpu.Barrier(num_arrivals=copies)
    made = tiles.run("linear_outputs", program, shapes, scratch, (b, H * parts, T // ROWS), inputs)
    named = {"out": made["out"]}
    if results:
        parted = made["vectors"].reshape(b, H, parts, len(results), T)
        merged = parted[:, :, 0] if "sums" in results else jnp.sum(parted, 2)
        named |= dict(zip(results, jnp.moveaxis(merged, 2, 0), strict=True))
    return named
