"""More streams for a model that has some, the old weights as they were; or the first one alone."""

import dataclasses

import jax
from flax import nnx
from jaxtyping import Array

from models.config import ModelConfig
from models.transformer import LanguageModel
from models.transforms import prefix_from_tokens
from models.trees import Tree, overlay
from models.weights import TransformParam
from sharding.settings import InputError

FREE = {"streams", "init_std", "max_length", "dtype", "layer_loop", "remat"}
DRAWN = {"transform_std", "transform_init", "smoothing"}
STREAM_FIELDS = {"transform", "transform_size", "aggregation"} | DRAWN


def check_growable(old: ModelConfig, new: ModelConfig) -> None:
    """Raises InputError if weights of a model `old` cannot start a model `new`."""
    free = FREE | (STREAM_FIELDS if old.streams == 1 else DRAWN)
    names = [name for name in new.__dataclass_fields__ if name not in free]
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if differing:
        flags = " ".join(f"--config.model.{name}={getattr(old, name)}" for name in differing)
        values = ", ".join(
            f"{name}={getattr(old, name)} there and {getattr(new, name)} here" for name in differing
        )
        raise InputError(f"the weights are of another shape of model: {values}; give {flags}")
    if new.streams < old.streams:
        raise InputError(
            f"streams={new.streams}: the weights have {old.streams} streams, which can only grow"
        )


def begin_from(config: ModelConfig, key: Array, given: Tree) -> Tree:
    """Initial parameters of a model, some of them given.

    Args:
      config: the model.
      key: of the initial values of what is new.
      given: nested dict of arrays of a model that `check_growable` lets through, or of parts of
        one; may be empty.

    Returns:
      nested dict of arrays: the given ones, and in each array that has a stream axis the given
      streams first, then new ones.
    """
    model = LanguageModel(config, rngs=nnx.Rngs(params=key))
    params = overlay(nnx.to_pure_dict(nnx.state(model)), given)
    if not given or config.streams == 1 or config.transform_init != "tokens":
        return params
    # New prefixes are keys and values of the given weights, not of those drawn here.
    model = nnx.merge(nnx.graphdef(model), params)
    prefix_from_tokens(model, jax.random.fold_in(key, 1))
    return overlay(nnx.to_pure_dict(nnx.state(model)), given)


def first_stream(model: LanguageModel) -> LanguageModel:
    """What computes the first of a model's streams alone.

    Raises:
      InputError: the streams differ by soft tokens, which are not weights of layers.
    """
    config = model.config
    if model.soft_length:
        raise InputError("transform=soft_tokens: the first stream cannot be computed alone")
    if config.streams == 1:
        return model
    graph, state = nnx.split(model)

    def first(weight):
        if not isinstance(weight, TransformParam):
            return weight
        # Counted from the end: layers may or may not be stacked.
        axis = weight.axes.index("streams") - len(weight.axes)
        return weight.replace(jax.lax.slice_in_dim(weight[...], 0, 1, axis=weight[...].ndim + axis))

    is_weight = lambda node: isinstance(node, nnx.Variable)
    alone = nnx.merge(graph, jax.tree.map(first, state, is_leaf=is_weight))
    alone.config = dataclasses.replace(config, streams=1)
    return alone
