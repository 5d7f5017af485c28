"""One description per weight: shape, logical axes, initial values.

Everything else follows from it: `nnx.eval_shape` of a model gives abstract weights whose `axes`
metadata become shardings (`sharding.rules`), optimizer state and checkpoint targets.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

zeros = nnx.initializers.zeros_init()
ones = nnx.initializers.ones_init()


class StreamParam(nnx.Param):
    """A weight that exists because there is more than one stream: transforms and aggregation."""


class WeightMaker:
    """Makes float32 weights, drawing a new key for each.

    Args:
      rngs: source of keys.
      std: standard deviation of the default (normal) initial values.
      layers: if given, every weight is stacked over that many layers, each drawn on its own.
    """

    def __init__(self, rngs: nnx.Rngs, std: float, layers: int | None = None):
        self._rngs = rngs
        self._std = std
        self._layers = layers

    def __call__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Initializer | None = None,
        kind: type[nnx.Param] = nnx.Param,
    ) -> nnx.Param:
        """A weight of this shape (per layer), with a logical axis name (or None) per dimension.

        Only the matrices, which are those that take the default initial values, are marked for
        weight decay.
        """
        if len(shape) != len(axes):
            raise ValueError(f"shape {shape} and axes {axes} differ in length")
        decay = init is None
        init = init or normal(self._std)
        key = self._rngs.params()
        if self._layers is None:
            return kind(init(key, shape, jnp.float32), axes=axes, decay=decay)
        keys = jax.random.split(key, self._layers)
        stack = jax.vmap(lambda key: init(key, shape, jnp.float32))(keys)
        return kind(stack, axes=("layers", *axes), decay=decay)


def normal(std: float) -> Initializer:
    """Normal initial values with mean 0 and this standard deviation."""
    return nnx.initializers.normal(std)
