"""Aaren: softmax attention of learned queries, as a recurrence (arXiv 2405.13956)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.context import Context
from models.layers import project
from models.recurrent import mix_after_soft_tokens, restart_state
from models.transforms import Projection, StreamTransform, layer_transform
from models.weights import TransformParam, WeightMaker, normal
from pallas_kernels.linear.aaren import AarenState, aaren
from sharding import rules, sequence
from sharding.sequence.aaren import sequence_aaren

HEADS = ("batch", "streams", None, "heads", None)
PARTS_OF_HEADS = ("batch", "streams", "length", "heads", None)


class VirtualSlot(StreamTransform):
    """A learnable score and value for each head, which every document has seen before its tokens.

    All that a query which never changes can learn of a prefix of M slots is one such slot.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        shape, axes = (config.streams, config.heads), ("streams", "heads")
        init = normal(config.transform_std)
        self.score = weight(shape, axes, init, TransformParam)
        self.value = weight(
            (*shape, config.value_head_dim), (*axes, "head_dim"), init, TransformParam
        )

    def state(self) -> AarenState:
        score = self.score[...]
        return AarenState(score, jnp.ones_like(score), self.value[...])


class Aaren(nnx.Module):
    """Softmax attention whose query is learned, one for each head, and the same at all positions.

    Keys and values have `heads` heads of `key_head_dim` and `value_head_dim`; there are no biases
    and no positions. Low-rank and bias transforms of the streams act on the values.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        width, heads = config.width, config.heads
        hk, hv = config.key_head_dim, config.value_head_dim
        self.q = weight((heads, hk), ("heads", "head_dim"))
        self.k = weight((width, heads, hk), ("embed", "heads", "head_dim"))
        self.v = weight((width, heads, hv), ("embed", "heads", "head_dim"))
        self.o = weight((heads, hv, width), ("heads", "head_dim", "embed"))
        projections = {"v": Projection("heads", heads, hv)}
        self.streams = layer_transform(config, weight, projections, VirtualSlot)

    def __call__(
        self, x: Float[Array, "B P T D"], context: Context, cache: AarenState | None = None
    ) -> tuple[Float[Array, "B P T D"], AarenState | None]:
        """Mixes positions; arguments and results as for the other recurrent mixers."""
        return mix_after_soft_tokens(self.mix, x, context, cache)

    def mix(
        self,
        x: Float[Array, "B P T D"],
        context: Context,
        cache: AarenState | None = None,
        start: AarenState | None = None,
    ) -> tuple[Float[Array, "B P T D"], AarenState]:
        """As `Recurrent.mix`."""
        with jax.named_scope("qkv"):
            k, v = project(x, self.k[...], self.v[...])
            v = self.streams.project("v", x, v)
        with jax.named_scope("recurrence"):
            memory = {
                "segment_ids": context.segment_ids,
                "restart_state": restart_state(self.streams, start),
            }
            if cache is None and sequence.parts() > 1:
                spec = rules.partition_spec(PARTS_OF_HEADS)
                y, state = sequence_aaren(self.q[...], k, v, spec=spec, **memory)
            else:
                k, v = rules.constrain(k, *HEADS), rules.constrain(v, *HEADS)
                y, state = aaren(self.q[...], k, v, initial_state=cache, **memory)
        with jax.named_scope("out"):
            out = self.o[...]
            y = project(y.reshape(*y.shape[:-2], -1), out.reshape(-1, out.shape[-1]))[0]
        return y, state

    def init_state(self, config: ModelConfig, batch: int) -> Any:
        """What `batch` rows remember before their first token."""
        state = self.streams.state()
        if state is None:
            shape = (config.streams, config.heads)
            value = jnp.zeros((*shape, config.value_head_dim))
            state = AarenState(jnp.full(shape, -jnp.inf), jnp.zeros(shape), value)
        return jax.tree.map(lambda part: jnp.broadcast_to(part, (batch, *part.shape)), state)
