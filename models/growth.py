"""More streams for a model that has some: old weights stay, new ones are drawn."""

from typing import Any

import jax
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel
from models.trees import overlay
from sharding.settings import InputError

FREE = {"streams", "init_std", "max_length", "dtype", "layer_loop", "remat"}
STREAM_FIELDS = {"transform", "transform_size", "transform_std", "aggregation", "smoothing"}


def check_growable(old: ModelConfig, new: ModelConfig) -> None:
    """Raises InputError if weights of a model `old` cannot start a model `new`."""
    free = FREE | (STREAM_FIELDS if old.streams == 1 else {"transform_std", "smoothing"})
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


def grow_streams(params: dict[str, Any], new: ModelConfig, seed: int) -> dict[str, Any]:
    """Parameters for a model with more streams.

    Args:
      params: nested dict of arrays of a model that `check_growable` lets through.
      new: the grown model.
      seed: of the initial values of what is new.

    Returns:
      nested dict of arrays: the given ones, and in each array that has a stream axis the given
      streams first, then new ones.
    """
    model = LanguageModel(new, rngs=nnx.Rngs(params=jax.random.key(seed)))
    return overlay(nnx.to_pure_dict(nnx.state(model)), params)
