"""What makes one stream differ from another (ParScale, arXiv 2505.10475, section 3).

A transform acts inside a layer's mixer through the hooks `prefix` (attention), `state` (recurrent
mixers) and `project`. The base class does nothing in them, and is what the plain model (P = 1) has.
Soft tokens act once, at the input of the model, and have a class of their own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.weights import TransformParam, WeightMaker, normal, zeros


class Projection(NamedTuple):
    """What a projection of a mixer gives: `axis` is the logical axis of its heads."""

    axis: str
    heads: int
    head_dim: int


class StreamTransform(nnx.Module):
    """No transform: every stream computes the same."""

    def prefix(self) -> tuple[Array, Array] | None:
        """Keys and values `[P, K, M, h]` that stand before the real ones, or None."""
        return None

    def state(self) -> Any:
        """What a recurrence starts from, its first axis P; None: nothing."""
        return None

    def project(self, name: str, x: Float[Array, "B P T D"], y: Array) -> Array:
        """What projection `name` ("q", "k" or "v") of `x` is, given its shared part `y`."""
        return y


class Prefix(StreamTransform):
    """Learnable keys and values, neither rotated nor counted as positions (prefix tuning)."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        shape = (config.streams, config.kv_heads, config.transform_size, config.head_dim)
        axes = ("streams", "kv_heads", "slots", "head_dim")
        self.k = weight(shape, axes, normal(config.transform_std), TransformParam)
        self.v = weight(shape, axes, normal(config.transform_std), TransformParam)

    def prefix(self) -> tuple[Array, Array]:
        return self.k[...], self.v[...]


class LowRank(StreamTransform):
    """Per-stream low-rank deltas on the q and v projections: y + (x A_p) B_p, B_p zero at first."""

    def __init__(
        self, config: ModelConfig, weight: WeightMaker, projections: Mapping[str, Projection]
    ):
        streams, rank = config.streams, config.transform_size
        self.names = tuple(name for name in projections if name != "k")
        for name in self.names:
            axis, heads, head_dim = projections[name]
            down = weight(
                (streams, config.width, rank),
                ("streams", "embed", "rank"),
                normal(config.transform_std),
                TransformParam,
            )
            up = weight(
                (streams, rank, heads, head_dim),
                ("streams", "rank", axis, "head_dim"),
                zeros,
                TransformParam,
            )
            setattr(self, f"{name}_down", down)
            setattr(self, f"{name}_up", up)

    def project(self, name: str, x: Float[Array, "B P T D"], y: Array) -> Array:
        if name not in self.names:
            return y
        down = getattr(self, f"{name}_down")[...].astype(x.dtype)
        up = getattr(self, f"{name}_up")[...].astype(x.dtype)
        return y + jnp.einsum("bptr,prnh->bptnh", jnp.einsum("bptd,pdr->bptr", x, down), up)


class Bias(StreamTransform):
    """Per-stream biases on the q, k and v projections."""

    def __init__(
        self, config: ModelConfig, weight: WeightMaker, projections: Mapping[str, Projection]
    ):
        for name, (axis, heads, head_dim) in projections.items():
            bias = weight(
                (config.streams, heads, head_dim),
                ("streams", axis, "head_dim"),
                normal(config.transform_std),
                TransformParam,
            )
            setattr(self, name, bias)

    def project(self, name: str, x: Float[Array, "B P T D"], y: Array) -> Array:
        return y + getattr(self, name)[...].astype(y.dtype)[:, None]


class SoftTokens(nnx.Module):
    """Learnable embeddings that stand before the real ones, one set per stream (prompt tuning)."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        self.tokens = weight(
            (config.streams, config.transform_size, config.width),
            ("streams", "slots", "embed"),
            normal(config.transform_std),
            TransformParam,
        )


def prefix_from_tokens(model: Any, key: Array) -> None:
    """Sets the prefixes of a model to the keys and values of vocabulary tokens drawn at random.

    A layer's M slots of stream p are what its own key and value projections, given their norm,
    make of M tokens' embeddings; not rotated, as prefixes are not. The draw is the same in every
    layer.

    Args:
      model: a `LanguageModel` with stacked layers of attention and the transform "prefix"; changed
        in place.
      key: of the draw.
    """
    config = model.config
    shape = (config.streams, config.transform_size)
    tokens = jax.random.randint(key, shape, 0, config.vocab_size)
    x = model.embedding[...][tokens]
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + config.norm_eps)
    for stack in model.stacks():
        mixer = stack.mixer
        normed = jnp.einsum("pmd,ld->lpmd", x, stack.mixer_norm.scale[...])
        for name in ("k", "v"):
            y = jnp.einsum("lpmd,ldkh->lpkmh", normed, getattr(mixer, name)[...])
            if mixer.biased:
                y += getattr(mixer, f"{name}_bias")[...][:, None, :, None, :]
            getattr(mixer.streams, name)[...] = y


def layer_transform(
    config: ModelConfig,
    weight: WeightMaker,
    projections: Mapping[str, Projection],
    prefix: Callable[[ModelConfig, WeightMaker], StreamTransform] = Prefix,
) -> StreamTransform:
    """The transform that `config` asks for inside each layer.

    Args:
      config: the model.
      weight: makes the transform's weights.
      projections: those of the mixer's "q", "k" and "v" that depend on the input.
      prefix: what transform=prefix is for this mixer.
    """
    if config.streams == 1 or config.transform == "soft_tokens":
        return StreamTransform()
    if config.transform == "prefix":
        return prefix(config, weight)
    return {"low_rank": LowRank, "bias": Bias}[config.transform](config, weight, projections)
