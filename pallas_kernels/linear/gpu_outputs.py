"""The kernel of the outputs: for each token a sum over the tokens of its chunk, and the states.

    o_i = sum_s f_si (q_i S_s^T) + sum_j w_ij v_j,   w_ij = scale exp(a_i - b_j) (q_i k_j + c)

over j up to i, or, if `reverse`, from i on, with exp(b_j - a_i), so that the same kernel computes
outputs and gradients of queries, keys and values. A program has 64 tokens i and goes through the
tiles of their chunk, so that no chunk is too long for it. Where each dimension of a key has its own
decay, w is given.
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


class OutputInputs(NamedTuple):
    """Arrays with padded axes; b runs over N and P.

    Attributes:
      q, k: `[b, T, K or H, x]`; v: `[b, T, K or H, y]`. Without k, `weights` are given.
      own: of tokens i: "high" and "low" of a, perhaps "document", "bias" (c, for each i), and for
        each state its factor, "state" and "restart". With "before" and "floor" the output is
        divided by max(|before + sum of w|, floor).
      other: of tokens j: "high", "low", perhaps "document" and "bias".
      states: "state" `[b, H n, y, x]` and "restart" `[P, H, y, x]`, none, one or both; with the
        last axes swapped if `call` is told so.
      against: `[b, T, K or H, y]`, whose products with o_i are wanted; or None.
      weights: w, for each later token of a pair by the place of the earlier one in their chunk.
      q_restart: q for the state "restart", if it is another one.
    """

    q: Float[Array, "b T K x"]
    k: Float[Array, "b T K x"] | None
    v: Float[Array, "b T K y"]
    own: Vectors | None
    other: Vectors | None
    states: dict[str, Array]
    against: Float[Array, "b T K y"] | None = None
    weights: Float[Array, "b T H C"] | None = None
    q_restart: Float[Array, "b T H x"] | None = None


def call(
    inputs: OutputInputs,
    heads: int,
    chunk: int,
    scale: float,
    reverse: bool = False,
    swapped: bool = False,
    name: str = "linear_outputs",
):
    """The outputs, by name: "out", `[b, T, H, y]` in the type of q; float32 `[b, H, T]`
    "sums", what outputs are divided by but for `floor`, or, with `against`, its products with
    q_i S_s^T, by the name of the state, and with o_i, "against".

    Args:
      heads: H.
      chunk: tokens in a chunk.
      swapped: states are `[.., x, y]`.
      name: of the kernel, in profiles.
    """
    (b, T, _, x), y = inputs.q.shape, inputs.v.shape[-1]
    own_names, other_names = tiles.names_of(inputs.own), tiles.names_of(inputs.other)
    results = [*inputs.states, "against"] if inputs.against is not None else []
    results += ["sums"] if "floor" in own_names else []
    dtype, H, per = inputs.q.dtype, heads, chunk // ROWS
    plan = _plan(inputs, x, y, per, swapped, results)
    parts, width, stages = y // plan.width, plan.width, plan.stages

    def program(operands, outs, memory):
        batch, unit, i = (lax.axis_index(name) for name in ("batch", "head", "block"))
        head, part = lax.div(unit, parts), lax.rem(unit, parts)
        c, place = lax.div(i, per), lax.rem(i, per)
        mine, columns = tiles.ds(i * ROWS), pl.ds(part * width, width)

        def tokens(array, rows, *index):
            return array.at[batch, rows, tiles.head_of(array, head, H), *index]

        def copies(step):
            j = i + step if reverse else i - step
            yield "v", tokens(operands.v, tiles.ds(j * ROWS), columns)
            if operands.k is not None:
                yield "k", tokens(operands.k, tiles.ds(j * ROWS))
                yield "other", operands.other.array.at[batch, head, :, tiles.ds(j * ROWS)]
            else:
                later, earlier = (j, i) if reverse else (i, j)
                place = tiles.ds(lax.rem(earlier, per) * ROWS)
                yield "weights", operands.weights.at[batch, tiles.ds(later * ROWS), head, place]

        def copy_own(name, source):
            plgpu.copy_gmem_to_smem(source, memory[name], memory["fetched"])

        copy_own("q", tokens(operands.q, mine))
        if own_names:
            copy_own("own", operands.own.array.at[batch, head, :, mine])
        if operands.q_restart is not None:
            copy_own("q_restart", tokens(operands.q_restart, mine))
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
        visits = tiles.Ring(memory, copies, steps)
        visits.start()
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
            is_other = name == "restart" and inputs.q_restart is not None
            q = memory["q_restart" if is_other else "q"]
            found = tiles.multiply(zero, (q, matrix))
            if operands.against is not None:
                keep_vector(name, jnp.sum(found * tiles.loaded(memory["against"]), 1))
            out = out + (found * own(name, found.shape) if name in own_names else found)

        def factors(step, is_first):
            """Of the v of a tile, float32."""

            def other(name):
                vector = visits.at("other", step).at[other_names.index(name)]
                vector = tiles.laid_out(vector[...], tiles.PER_COLUMN)
                return tiles.spread(vector, shape, 1)

            shape = (ROWS, ROWS)
            zero = tiles.filled(shape, 0.0, tiles.MATRIX)
            raw = tiles.multiply(zero, (memory["q"], tiles.turned(visits.at("k", step))))
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
            visits.wait(step)
            if inputs.weights is not None:
                weights = visits.at("weights", step)
                pair = (tiles.turned(weights) if reverse else weights, visits.at("v", step))
                return tiles.multiply(out, pair), sums
            weights = factors(step, is_first)
            if sums is not None:
                sums = sums + jnp.sum(weights, 1)
            out = tiles.multiply(out, (weights.astype(dtype), visits.at("v", step)))
            return out, sums

        def later(step, carry):
            carry = add(step, False, carry)
            plgpu.commit_smem()
            visits.refill(step)
            return carry

        sums = own("before") if "floor" in own_names else None
        carry = add(0, True, (out, sums))
        if per > 1:
            plgpu.commit_smem()
            visits.refill(0)
            carry = lax.fori_loop(1, steps, later, carry)
        out, sums = carry
        if sums is not None:
            keep_vector("sums", sums)
            out = out / tiles.spread(jnp.maximum(jnp.abs(sums), own("floor")), out.shape, 0)
        if operands.against is not None:
            keep_vector("against", jnp.sum(out * tiles.loaded(memory["against"]), 1))
        plgpu.commit_smem()
        memory[plan.target][...] = out.astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(memory[plan.target], outs["out"].at[batch, mine, head, columns])
        if results:
            plgpu.copy_smem_to_gmem(memory["vectors"], outs["vectors"].at[batch, unit, :, mine])
        plgpu.wait_smem_to_gmem(0)

    shapes = {"out": jax.ShapeDtypeStruct((b, T, H, y), dtype)}
    scratch = {
        **plan.copied,
        **plan.written,
        **plan.ring,
        "fetched": plgpu.Barrier(num_arrivals=len(plan.copied)),
        "ready": plgpu.Barrier(num_arrivals=len(plan.ring), num_barriers=stages),
    }
    if results:
        vector_shape = (b, H * parts, len(results), T)
        shapes["vectors"] = jax.ShapeDtypeStruct(vector_shape, jnp.float32)
    made = tiles.run(name, program, shapes, scratch, (b, H * parts, T // ROWS), inputs)
    named = {"out": made["out"]}
    if results:
        parted = made["vectors"].reshape(b, H, parts, len(results), T)
        merged = parted[:, :, 0] if "sums" in results else jnp.sum(parted, 2)
        named |= dict(zip(results, jnp.moveaxis(merged, 2, 0), strict=True))
    return named


class _Plan(NamedTuple):
    """How a program uses shared memory.

    Attributes:
      width: columns of the output that it computes.
      stages: tiles of tokens j that are in memory at a time.
      copied, ring, written: memory by name: of what is copied once, of what is copied for each
        tile, and of results.
      target: the memory of the output.
    """

    width: int
    stages: int
    copied: dict
    ring: dict
    written: dict
    target: str


def _plan(inputs, x, y, per, swapped, results):
    # Two programs on a multiprocessor hide each other's waits better than a second stage would.
    for memory in (SHARED_MEMORY // 2, SHARED_MEMORY):
        for width in (w for w in (y, 128, 64) if w <= 192 and y % w == 0):
            once, ring, written, target = _memory(inputs, x, width, swapped, results, 1)
            stages = tiles.most_stages(memory, {**once, **written}, ring, min(2, per))
            if stages and (width >= min(y, 128) or memory == SHARED_MEMORY):
                ring = _memory(inputs, x, width, swapped, results, stages)[1]
                return _Plan(width, stages, once, ring, written, target)
    raise ValueError(f"{x} x {y} is too large a state for shared memory")


def _memory(inputs, x, width, swapped, results, stages):
    """`_Plan.copied`, `_Plan.ring`, `_Plan.written` and `_Plan.target`."""
    dtype, own, other = inputs.q.dtype, tiles.names_of(inputs.own), tiles.names_of(inputs.other)
    state = (x, width) if swapped else (width, x)
    once = {"q": tiles.shared((ROWS, x), dtype)}
    once |= {name: tiles.shared(state, dtype) for name in inputs.states}
    if own:
        once["own"] = plgpu.SMEM((len(own), ROWS), jnp.float32)
    if inputs.q_restart is not None:
        once["q_restart"] = tiles.shared((ROWS, x), dtype)
    if inputs.against is not None:
        once["against"] = tiles.shared((ROWS, width), dtype)
    ring = {"v": tiles.shared((stages, ROWS, width), dtype)}
    if inputs.k is None:
        ring["weights"] = tiles.shared((stages, ROWS, ROWS), dtype)
    else:
        ring["k"] = tiles.shared((stages, ROWS, x), dtype)
        ring["other"] = plgpu.SMEM((stages, len(other), ROWS), jnp.float32)
    # Where it can, the output takes the place of what its program no longer needs.
    target = "against" if inputs.against is not None else "q" if x == width else "out"
    written = {"out": tiles.shared((ROWS, width), dtype)} if target == "out" else {}
    if results:
        written["vectors"] = plgpu.SMEM((len(results), ROWS), jnp.float32)
    return once, ring, written, target
