"""Tiles of the Mosaic GPU kernels of linear attention.

A program is one warpgroup that multiplies tiles of 64 rows, and copies its own operands ahead of
their use: several programs run on a multiprocessor at once.
"""

import dataclasses
import inspect
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import dispatch
from pallas_kernels.flash.gpu_tiles import (
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    ROWS,
    filled,
    laid_out,
    positions,
    shared,
    spread,
)

__all__ = [
    "MATRIX",
    "PER_COLUMN",
    "PER_ROW",
    "ROWS",
    "filled",
    "laid_out",
    "positions",
    "shared",
    "spread",
]

# jax 0.10 asks for an index, newer versions advise against one.
_IDX = inspect.signature(plgpu.load).parameters.get("idx")
WHOLE = ((),) if _IDX is not None and _IDX.default is _IDX.empty else ()
SHARED_MEMORY = 222 * 1024  # bytes of one program for tiles; Hopper has 227 KiB


def ds(first):
    """The `ROWS` positions from `first`."""
    return pl.ds(first, ROWS)


def turned(tile):
    """The transpose of a tile of a 16-bit type in shared memory, as an operand of `multiply`."""
    return tile[...].T if dispatch.interpret() else tile.transpose((1, 0))


def multiply(sums, *pairs):
    """sums + the products a b of `pairs`, in float32.

    Args:
      sums: a tile in registers.
      pairs: of a, in registers or shared memory, and b, in shared memory.
    """
    if dispatch.interpret():
        for a, b in pairs:
            sums = sums + jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)
        return sums

    def issue(result):
        for a, b in pairs:
            plgpu.wgmma(result, a, b)

    return pl.run_state(issue)(plgpu.ACC.init(sums))


def loaded(tile):
    """A tile of shared memory in registers, float32."""
    return laid_out(tile[...], MATRIX).astype(jnp.float32)


def fetched(tile):
    """A float32 tile of global memory in registers."""
    if dispatch.interpret():
        return tile[...]
    return plgpu.load(tile, *WHOLE, layout=MATRIX, optimized=False)


def head_of(x: Float[Array, "b T heads h"], head, heads: int):
    """The head of `x` that head number `head` of `heads` reads."""
    return lax.div(head, heads // x.shape[2]) if x.shape[2] != heads else head


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Vectors:
    """Numbers for each token, float32, one array for all that are copied together.

    Attributes:
      names: of them.
      array: `[b, H, names, T]`.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    array: Float[Array, "b H names T"]


def vectors(**named: Float[Array, "b H T"] | None) -> Vectors | None:
    """`Vectors` of those that are not None; None if all are."""
    named = {name: x for name, x in named.items() if x is not None}
    return Vectors(tuple(named), jnp.stack(list(named.values()), 2)) if named else None


def names_of(x: Vectors | None) -> tuple[str, ...]:
    return () if x is None else x.names


def run(name, body, outs, scratch, grid, operands):
    """Calls `body(operands, outs, scratch)`, all refs by name, for each point of (batch, head,
    block).

    Args:
      name: of the kernel, in profiles.
      outs: shapes and dtypes of the results, by name.
      scratch: memory, by name.
      grid: sizes; blocks vary fastest.
      operands: a tree of arrays.

    Returns:
      the results, by name.
    """

    def kernel(inputs, *rest):
        results, memory = rest[: len(outs)], rest[len(outs) :]
        results = dict(zip(outs, results, strict=True))
        body(inputs, results, dict(zip(scratch, memory, strict=True)))

    kernel.__name__ = name
    call = plgpu.kernel(
        kernel,
        out_type=tuple(outs.values()),
        scratch_types=tuple(scratch.values()),
        grid=grid,
        grid_names=("batch", "head", "block"),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=dispatch.interpret(),
    )
    return dict(zip(outs, call(operands), strict=True))


def most_stages(memory: int, fixed: dict, ring: dict, limit: int) -> int:
    """How many stages of `ring` fit in `memory` bytes beside `fixed`, at most `limit`.

    Args:
      fixed, ring: shared memory by name; `ring` of one stage.
    """
    size = lambda parts: sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in parts)
    each, rest = size(ring.values()), memory - size(fixed.values())
    return max(0, min(limit, rest // each))


class Ring:
    """Tiles that a program visits one after the other, in memory of `stages` of them.

    A program calls `start` once, then for each step `wait`, reads what `at` gives, and calls
    `refill` after all of its threads have met since the reads of the step before that one.

    Args:
      memory: of the program: arrays with an axis of stages, and the barriers "ready".
      copies: a function of a step that gives (name, source) of each copy.
      steps: how many there are.
    """

    def __init__(self, memory, copies, steps):
        self.memory, self.copies, self.steps = memory, copies, steps
        self.stages = memory["ready"].shape[0]

    def start(self):
        for step in range(self.stages):
            pl.when(step < self.steps)(lambda step=step: self._copy(step))

    def wait(self, step):
        plgpu.barrier_wait(self.at("ready", step))

    def at(self, name, step):
        return self.memory[name].at[lax.rem(step, self.stages)]

    def refill(self, step):
        """Copies what takes the place of a step's tiles."""
        pl.when(step + self.stages < self.steps)(lambda: self._copy(step + self.stages))

    def _copy(self, step):
        for name, source in self.copies(step):
            plgpu.copy_gmem_to_smem(source, self.at(name, step), self.at("ready", step))
