"""How the P streams become one (ParScale, arXiv 2505.10475, equation 7)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.weights import StreamParam, WeightMaker, zeros
from sharding import rules


class Aggregation(nnx.Module):
    """A weighted sum over the streams; here with equal weights, of which nothing is learned."""

    def __init__(self, config: ModelConfig):
        self.smoothing = config.smoothing

    def logits(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T P"]:
        """Unnormalised logarithms of the weights, float32."""
        batch, streams, length, _ = x.shape
        return jnp.zeros((batch, length, streams), jnp.float32)

    def weights(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T P"]:
        """Positive weights that sum to 1 over the streams, each at least smoothing / P; float32."""
        weights = jax.nn.softmax(self.logits(x), -1)
        return (1 - self.smoothing) * weights + self.smoothing / x.shape[1]

    def __call__(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T D"]:
        """The streams' outputs, mixed; in the type of `x`."""
        weights = jnp.moveaxis(self.weights(x), -1, 1)[..., None]
        return jnp.sum(weights * x, 1).astype(x.dtype)


class ConstantAggregation(Aggregation):
    """Learned weights that do not depend on the input."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config)
        self.bias = weight((config.streams,), ("streams",), zeros, StreamParam)

    def logits(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T P"]:
        batch, streams, length, _ = x.shape
        return jnp.broadcast_to(self.bias[...], (batch, length, streams))


class DynamicAggregation(Aggregation):
    """W2 silu(W1 [x_1 ... x_P] + b1) + b2, a weight per token and stream."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config)
        streams, width = config.streams, config.width
        self.hidden = weight((streams, width, width), ("streams", "embed", None), kind=StreamParam)
        self.hidden_bias = weight((width,), (None,), zeros, StreamParam)
        self.out = weight((width, streams), (None, "streams"), kind=StreamParam)
        self.out_bias = weight((streams,), ("streams",), zeros, StreamParam)

    def logits(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T P"]:
        weight, wide = self.hidden[...].astype(x.dtype), {"preferred_element_type": jnp.float32}
        if rules.is_sharded():
            hidden = jnp.einsum("bptd,pde->bte", x, weight, **wide)
        else:
            # As one flat product: XLA on CPU transposes the weight for the sum over two axes.
            batch, streams, length, width = x.shape
            flat = jnp.moveaxis(x, 1, 2).reshape(batch * length, streams * width)
            hidden = jnp.dot(flat, weight.reshape(streams * width, -1), **wide)
            hidden = hidden.reshape(batch, length, -1)
        hidden = jax.nn.silu(hidden + self.hidden_bias[...])
        return jnp.einsum("bte,ep->btp", hidden, self.out[...]) + self.out_bias[...]


def make_aggregation(config: ModelConfig, weight: WeightMaker) -> Aggregation:
    """The aggregation that `config` asks for."""
    if config.aggregation == "dynamic":
        return DynamicAggregation(config, weight)
    if config.aggregation == "constant":
        return ConstantAggregation(config, weight)
    return Aggregation(config)
