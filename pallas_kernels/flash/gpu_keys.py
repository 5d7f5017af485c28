"""Blocks of keys and values as a kernel with one program for each block of queries meets them."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.flash import gpu_tiles as tiles
from pallas_kernels.flash.gpu_tiles import WARPGROUPS
from pallas_kernels.masks import Mask
from pallas_kernels.masks.blocks import PARTIAL, block_kinds, row_lists


class Static(NamedTuple):
    """What is known when tracing.

    Attributes:
      streams: P.
      group: G.
      queries, keys, slots: T, S and M before padding; M is 0 without a prefix.
      block_k: keys in a block.
      stages: blocks of keys that are in shared memory at a time.
      mask_rows, mask_streams: leading axes of the mask, each 1 or as many as N and P.
      causal, dilation: of the mask.
    """

    streams: int
    group: int
    queries: int
    keys: int
    slots: int
    block_k: int
    stages: int
    mask_rows: int
    mask_streams: int
    causal: bool
    dilation: int

    def stream(self, b):
        """p of the index b over N and P."""
        return lax.rem(b, self.streams)

    def mask_entry(self, b):
        """The mask's index m for the index b over N and P."""
        n = lax.div(b, self.streams) if self.mask_rows > 1 else 0
        p = self.stream(b) if self.mask_streams > 1 else 0
        return n * self.mask_streams + p


class Visits(NamedTuple):
    """The blocks that a mask leaves, row after row.

    Attributes:
      codes: int32, 4 * column + kind.
      counts: int32, how many in each row.
    """

    codes: Int[Array, "m I J"]
    counts: Int[Array, "m I"]


def visits(mask: Mask, static: Static, block_q: int, block_k: int, by_keys=False) -> Visits:
    """Blocks of keys for each block of queries; by_keys: of queries for each block of keys."""
    kinds = block_kinds(mask, static.queries, static.keys, block_q, block_k)
    lists = row_lists(kinds.swapaxes(-1, -2) if by_keys else kinds)
    codes = lists.columns * 4 + lists.kinds
    codes = jnp.asarray(codes, jnp.int32).reshape(-1, *codes.shape[-2:])
    return Visits(codes, jnp.asarray(lists.counts, jnp.int32).reshape(codes.shape[:2]))


def mask_runs(mask: Mask, padded: int, width: int) -> Int[Array, "m groups ends width"] | None:
    """Starts and ends of the runs of groups of keys, empty in the padding; ends: 2 R."""
    if mask.intervals is None:
        return None
    Nm, Pm, R, _, S = mask.intervals.shape
    runs = jnp.pad(mask.intervals, [(0, 0)] * 4 + [(0, padded - S)])
    return runs.reshape(Nm * Pm, 2 * R, padded // width, width).swapaxes(1, 2)


class Inputs(NamedTuple):
    """Arrays with padded axes.

    Attributes:
      k, v: `[N P, S, K, h]`.
      prefix_k, prefix_v: `[P, M, K, h]`, or None.
      visits: of blocks of keys for each block of queries.
      runs: for each block of keys, or None.
    """

    k: Float[Array, "b S K h"]
    v: Float[Array, "b S K h"]
    prefix_k: Float[Array, "P M K h"] | None
    prefix_v: Float[Array, "P M K h"] | None
    visits: Visits
    runs: Int[Array, "m J ends block_k"] | None


def scratch(static: Static, inputs: Inputs):
    """Shared memory that a `Ring` needs, by name."""
    stages, h, dtype = static.stages, inputs.k.shape[-1], inputs.k.dtype
    memory = {
        "k": tiles.shared((stages, static.block_k, h), dtype),
        "v": tiles.shared((stages, static.block_k, h), dtype),
        "k_ready": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "v_ready": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    if inputs.runs is not None:
        memory["runs"] = plgpu.SMEM((stages, *inputs.runs.shape[2:]), jnp.int32)
        memory["k_ready"] = plgpu.Barrier(num_arrivals=2, num_barriers=stages)
    return memory


class Ring:
    """The blocks that block i of queries visits: those of the prefix, then those of the mask.

    One warpgroup calls `fill`; the others go through the steps, and for each of them `wait` for
    "k" and "v", read the `block`, and `release` it.
    """

    def __init__(self, static: Static, inputs: Inputs, memory, b, head, i):
        self.static, self.inputs, self.memory = static, inputs, memory
        self.b, self.head_k, self.i = b, lax.div(head, static.group), i
        self.m = static.mask_entry(b)
        self.before = -(-static.slots // static.block_k)
        self.steps = self.before + inputs.visits.counts[self.m, i]

    def fill(self):
        """Copies one block after the other as the memory for it gets free."""
        lax.fori_loop(0, self.steps, self._copy, None)

    def wait(self, name, step):
        plgpu.barrier_wait(self._at(f"{name}_ready", step))

    def block(self, name, step):
        return self._at(name, step)

    def release(self, name, step):
        @pl.when(step + self.static.stages < self.steps)
        def _():
            plgpu.barrier_arrive(self._at(f"{name}_free", step))

    def loop(self, step, carry):
        """Folds `step(hide, step, carry)` over the blocks.

        `hide(x, value, first)` is a tile of 64 queries, from `first`, and the keys of the block,
        with `value` where a key is not seen.
        """

        def with_slots(n, carry):
            def hide(x, value, first):
                s = tiles.positions(x.shape, 1, n * self.static.block_k)
                return jnp.where(s < self.static.slots, x, value)

            return step(hide, n, carry)

        def with_keys(n, carry):
            column, kind = self._visit(n)

            def hide(x, value, first):
                def hidden(x):
                    return jnp.where(self._seen(n, column, first, x.shape), x, value)

                return lax.cond(kind == PARTIAL, hidden, lambda x: x, x)

            return step(hide, n, carry)

        if self.before:
            carry = lax.fori_loop(0, self.before, with_slots, carry)
        return lax.fori_loop(self.before, self.steps, with_keys, carry)

    def _seen(self, step, column, first, shape):
        t = tiles.positions(shape, 0, first)
        s = tiles.positions(shape, 1, column * self.static.block_k)
        ends = []
        if self.inputs.runs is not None:
            ring = self._at("runs", step)
            ends = [tiles.laid_out(ring[r], tiles.PER_COLUMN) for r in range(ring.shape[0])]
        ends = [tiles.spread(end, shape, 1) for end in ends]
        static = self.static
        return tiles.visible(t, s, ends, static.keys, static.causal, static.dilation)

    def _visit(self, step):
        code = self.inputs.visits.codes[self.m, self.i, lax.max(step - self.before, 0)]
        return lax.div(code, 4), lax.rem(code, 4)

    def _at(self, name, step):
        return self.memory[name].at[lax.rem(step, self.static.stages)]

    def _copy(self, step, _):
        static, inputs = self.static, self.inputs
        column, _ = self._visit(step)

        def copy(name, from_prefix, from_keys):
            into, ready = self._at(name, step), self._at(f"{name}_ready", step)
            pl.when(step >= static.stages)(
                lambda: plgpu.barrier_wait(self._at(f"{name}_free", step))
            )
            if from_prefix is None:
                plgpu.copy_gmem_to_smem(self._keys(from_keys, self.b, column), into, ready)
                return

            @pl.when(step < self.before)
            def _():
                source = self._keys(from_prefix, static.stream(self.b), step)
                plgpu.copy_gmem_to_smem(source, into, ready)

            @pl.when(step >= self.before)
            def _():
                plgpu.copy_gmem_to_smem(self._keys(from_keys, self.b, column), into, ready)

        copy("k", inputs.prefix_k, inputs.k)
        if inputs.runs is not None:
            # Copied for the blocks of the prefix too: "k_ready" counts as many arrivals for each.
            source = inputs.runs.at[self.m, column]
            plgpu.copy_gmem_to_smem(source, self._at("runs", step), self._at("k_ready", step))
        copy("v", inputs.prefix_v, inputs.v)

    def _keys(self, x, b, block):
        rows = pl.ds(block * self.static.block_k, self.static.block_k)
        return x.at[b, rows, self.head_k]
