"""The GPU kernels of linear attention, called with the arrays of one call of the op."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import gpu_outputs, gpu_states
from pallas_kernels.linear.gpu_prepare import Constants, Prepared
from pallas_kernels.linear.gpu_tiles import ROWS, vectors
from pallas_kernels.linear.options import Inputs, NormalizedState, Options

SHARED_MEMORY = 220 * 1024  # bytes of one program; Hopper has 227 KiB
MAX_STAGES = 4


def padded(inputs: Inputs) -> Inputs:
    """With head dimensions that are multiples of 64."""
    return inputs._replace(
        q=widened(inputs.q),
        k=widened(inputs.k),
        v=widened(inputs.v),
        initial=padded_state(inputs.initial),
        restart=padded_state(inputs.restart),
    )


def padded_state(state: NormalizedState | None) -> NormalizedState | None:
    """As of `padded` inputs."""
    if state is None:
        return None
    normalizer = None if state.normalizer is None else widened(state.normalizer)
    return state._replace(matrix=widened(state.matrix, 2), normalizer=normalizer)


def cut_state(state: NormalizedState, hk: int, hv: int) -> NormalizedState:
    """Without that padding."""
    normalizer = None if state.normalizer is None else state.normalizer[..., :hk]
    return state._replace(matrix=state.matrix[..., :hk, :hv], normalizer=normalizer)


def widened(x: Array, axes: int = 1) -> Array:
    """With as many last axes padded."""
    widths = [(0, 0)] * (x.ndim - axes) + [(0, -size % ROWS) for size in x.shape[-axes:]]
    return jnp.pad(x, widths)


def turned(x: Float[Array, "*lead H hk hv"]) -> Float[Array, "b H_hv hk"]:
    """A state as the kernel of the states takes it."""
    x = x.mT
    return x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1])


@dataclasses.dataclass(frozen=True)
class Call:
    """Padded arrays of one call.

    Attributes:
      options, inputs: of the op, `padded`.
      prepared, constants: of `gpu_prepare.prepare`.
    """

    options: Options
    inputs: Inputs
    prepared: Prepared
    constants: Constants

    def tokens(self, x: Float[Array, "N P T K h"]) -> Float[Array, "b T K h"]:
        """With whole chunks."""
        N, P, T, K, h = x.shape
        x = x.reshape(N * P, T, K, h)
        return jnp.pad(x, [(0, 0), (0, -T % self.options.chunk), (0, 0), (0, 0)])

    def vector(self, x: Float[Array, "N P T H"]) -> Float[Array, "b H T"]:
        """With whole chunks."""
        return self.tokens(x[..., None])[..., 0].swapaxes(1, 2)

    def untokens(self, x: Float[Array, "b T heads h"]) -> Float[Array, "N P T heads h"]:
        N, P, T = self.inputs.q.shape[:3]
        return x[:, :T].reshape(N, P, T, *x.shape[2:])

    def state(self, x: Float[Array, "b H_hv hk"]) -> Float[Array, "N P H hk hv"]:
        """The inverse of `turned`."""
        N, P, _, H, hv = self.inputs.v.shape
        return x.reshape(N, P, H, hv, x.shape[-1]).mT

    @property
    def q(self):
        return self.tokens(self.inputs.q)

    @property
    def k(self):
        return self.tokens(self.inputs.k)

    @property
    def v(self):
        return self.tokens(self.inputs.v)

    @property
    def again(self) -> Float[Array, "P H hv hk"] | None:
        """What documents start from, if any does."""
        return None if self.prepared.restart is None else self.inputs.restart.matrix.mT

    def states(self, keys, values, start, factors, solve=None, more=None, reverse=False):
        """`gpu_states.call`.

        Args:
          start: as `turned` gives it, or None.
          factors: by name; those that are None are 1.
        """
        dtype, again = self.inputs.q.dtype, None
        if self.again is not None and not reverse:
            again = (self.prepared.again, turned(self.inputs.restart.matrix))
        inputs = gpu_states.StateInputs(
            keys.astype(dtype),
            values.astype(dtype),
            vectors(**factors),
            self.prepared.keep,
            start,
            again,
            None if solve is None else solve.astype(dtype),
            None if more is None else tuple(x.astype(dtype) for x in more),
        )
        hk = keys.shape[-1]
        tile = 2 * ROWS * ROWS
        each = 2 * ROWS * hk + tile + 8 * hk + 1024
        fixed = 2 * ROWS * hk + 2 * tile
        if solve is not None:
            each, fixed = each + 2 * ROWS * hk, fixed + tile
        if more is not None:
            each, fixed = each + 2 * ROWS * hk + tile, fixed + 2 * tile
        stages = min(MAX_STAGES, (SHARED_MEMORY - fixed) // each)
        return gpu_states.call(inputs, self.inputs.q.shape[1], reverse, stages)

    def outputs(self, q, k, v, states, own, other=None, against=None, swapped=False, reverse=False):
        """`gpu_outputs.call`, with the exponents of queries (`reverse`: keys) for tokens i.

        Args:
          states: by name.
          own, other: numbers of tokens i and j, by name, or None.
        """
        dtype = self.inputs.q.dtype
        exponents = [self.prepared.queries_low, self.prepared.keys_low]
        constants = {"high": self.constants.high, "document": self.constants.document}
        lows = exponents[::-1] if reverse else exponents
        inputs = gpu_outputs.OutputInputs(
            q.astype(dtype),
            k.astype(dtype),
            v.astype(dtype),
            vectors(**constants, low=lows[0], **own),
            vectors(**constants, low=lows[1], **(other or {})),
            {name: x.astype(dtype) for name, x in states.items() if x is not None},
            against,
        )
        chunk, H = self.options.chunk, self.inputs.v.shape[3]
        return gpu_outputs.call(
            inputs, H, chunk, self.options.scale, SHARED_MEMORY, reverse, swapped
        )
