"""One description per weight: shape, logical axes, initial values.

Everything else follows from it: `nnx.eval_shape` of a model gives abstract weights whose `axes`
metadata become shardings (`sharding.rules`), optimizer state and checkpoint targets.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from sharding import rules

FLAT_DRAW = 1 << 20
"""Elements up to which initial values are drawn as one row."""

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]

zeros = nnx.initializers.zeros_init()
ones = nnx.initializers.ones_init()


class StreamParam(nnx.Param):
    """A weight that exists because there is more than one stream: transforms and aggregation."""


class TransformParam(StreamParam):
    """A weight of the input transform, which is what makes one stream differ from another."""


class WeightMaker:
    """Makes float32 weights, drawing a new key for each.

    Args:
      rngs: source of keys.
      std: standard deviation of the default (normal) initial values.
      layers: if given, every weight is stacked over that many layers.
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
        if self._layers is not None:
            # All layers in one draw: a key for each would take longer to compile.
            shape, axes = (self._layers, *shape), ("layers", *axes)
        return kind(init(key, shape, jnp.float32), axes=axes, decay=decay)


def abstract_weights(state: nnx.State, mesh: Mesh) -> dict[str, Any]:
    """A nested dict of `jax.ShapeDtypeStruct` with the shardings that the axes of weights give.

    Args:
      state: weights, abstract ones too.
      mesh: to lie on.

    Raises:
      InputError: a dimension does not divide over the mesh; names the weight.
    """

    def place(path, weight):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        rules.check_divisible(name, weight.shape, weight.axes, mesh)
        sharding = NamedSharding(mesh, rules.partition_spec(weight.axes, name))
        return jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=sharding)

    return map_weights(place, state, with_path=True)


def map_weights(function, state: nnx.State, *, with_path: bool = False) -> dict[str, Any]:
    """A nested dict with `function(variable)` (or `function(path, variable)`) for every weight."""
    is_weight = lambda node: isinstance(node, nnx.Variable)
    mapping = jax.tree_util.tree_map_with_path if with_path else jax.tree.map
    return nnx.to_pure_dict(mapping(function, state, is_leaf=is_weight))


def normal(std: float) -> Initializer:
    """Normal initial values with mean 0 and this standard deviation."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        # A flat draw has the same values and compiles five times faster; a large weight is drawn
        # in its shape, so that on a mesh every device draws its own part only.
        size = math.prod(shape)
        drawn = (size,) if size <= FLAT_DRAW else shape
        return std * jax.random.normal(key, drawn, dtype).reshape(shape)

    return init


def constant(value: float) -> Initializer:
    """The same initial value everywhere."""
    return nnx.initializers.constant(value)


def uniform(low: float, high: float) -> Initializer:
    """Initial values from a uniform distribution."""
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def linspace(first: float, last: float) -> Initializer:
    """Values from `first` to `last` at equal distances along the last axis."""
    return lambda key, shape, dtype: jnp.broadcast_to(
        jnp.linspace(first, last, shape[-1], dtype=dtype), shape
    )


def log_uniform(low: float, high: float) -> Initializer:
    """Logarithms of values from a uniform distribution."""
    draw = uniform(low, high)
    return lambda key, shape, dtype: jnp.log(draw(key, shape, dtype))


def softplus_inverse_of(low: float, high: float) -> Initializer:
    """Values whose softplus has a logarithm from a uniform distribution, from `low` to `high`."""
    draw = uniform(math.log(low), math.log(high))

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
        value = jnp.exp(draw(key, shape, dtype))
        return value + jnp.log(-jnp.expm1(-value))

    return init
