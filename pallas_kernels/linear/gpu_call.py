"""The GPU kernels of linear attention, as a call with one decay for each head uses them."""

import dataclasses

from jaxtyping import Array, Float

from pallas_kernels.linear import gpu_outputs, gpu_states
from pallas_kernels.linear.gpu_layout import tokens, turned
from pallas_kernels.linear.gpu_prepare import Constants, Prepared
from pallas_kernels.linear.gpu_tiles import vectors
from pallas_kernels.linear.options import Inputs, Options


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

    @property
    def q(self):
        return tokens(self.inputs.q, self.options.chunk)

    @property
    def k(self):
        return tokens(self.inputs.k, self.options.chunk)

    @property
    def v(self):
        return tokens(self.inputs.v, self.options.chunk)

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
            again = (self.prepared.again, turned(self.inputs.restart.matrix).astype(dtype))
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
        return gpu_states.call(inputs, self.inputs.q.shape[1], reverse)

    def outputs(
        self, q, k, v, states, own, other=None, against=None, swapped=False, reverse=False, **name
    ):
        """`gpu_outputs.call`, with the exponents of queries (`reverse`: keys) for tokens i.

        Args:
          states: by name.
          own, other: numbers of tokens i and j, by name, or None.
          name: of the kernel, if it is another one.
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
        return gpu_outputs.call(inputs, H, chunk, self.options.scale, reverse, swapped, **name)
