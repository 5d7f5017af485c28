"""What the recurrent mixers share: projections, short convolution, recurrence, norm and gate.

A mixer is a `Recurrent` that says which further products of its input it needs and what they mean
to `linear_attention`. Queries and keys have `kv_heads` heads of `key_head_dim`, values and outputs
`heads` of `value_head_dim`; the published forms have as many of both, or (gated DeltaNet) fewer
keys. Projections have no biases. Gates, states and norms are float32.
"""

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.context import Context
from models.convolution import convolve
from models.layers import project
from models.transforms import Projection, StreamTransform, layer_transform
from models.weights import TransformParam, WeightMaker, normal, ones, uniform
from pallas_kernels import NormalizedState, linear_attention, sharded_linear_attention
from sharding import rules, sequence
from sharding.sequence.linear import sequence_linear_attention

KEY_HEADS = ("batch", "streams", None, "kv_heads", None)
VALUE_HEADS = ("batch", "streams", None, "heads", None)
PARTS_OF_KEY_HEADS = ("batch", "streams", "length", "kv_heads", None)
PARTS_OF_VALUE_HEADS = ("batch", "streams", "length", "heads", None)


class RecurrentCache(NamedTuple):
    """What a recurrence remembers of all tokens so far.

    Attributes:
      state: float32 `[B, P, H, hk, hv]`, or a `NormalizedState`.
      inputs: of the short convolutions of q, k and v, the last `conv_size - 1` of each
        `[B, P, conv_size - 1, K or H, h]`; None where there is none.
    """

    state: Float[Array, "B P H hk hv"] | NormalizedState
    inputs: tuple[Array, Array, Array] | None


class InitialState(StreamTransform):
    """A learnable state for every document to start from, in place of a prefix's keys and values.

    A sum over the k v^T of M prefix slots would be such a state, of rank M.
    """

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        axes = ("streams", "heads", "head_dim", "head_dim")
        shape = (config.streams, config.heads, config.key_head_dim, config.value_head_dim)
        self.matrix = weight(shape, axes, normal(config.transform_std), TransformParam)

    def state(self) -> Any:
        return self.matrix[...]


class NormalizedInitialState(InitialState):
    """The same for a normalized recurrence, in units of exp(0)."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        shape = (config.streams, config.heads, config.key_head_dim)
        self.normalizer = weight(
            shape, ("streams", "heads", "head_dim"), normal(config.transform_std), TransformParam
        )

    def state(self) -> NormalizedState:
        normalizer = self.normalizer[...]
        return NormalizedState(self.matrix[...], normalizer, jnp.zeros(normalizer.shape[:2]))


class HeadNorm(nnx.Module):
    """Each head's output over its root mean square, times a scale that the heads share."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        self.eps = config.norm_eps
        self.scale = weight((config.value_head_dim,), ("head_dim",), ones)

    def __call__(self, x: Float[Array, "B P T H hv"]) -> Float[Array, "B P T H hv"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return x * self.scale[...]


class CenteredHeadNorm(nnx.Module):
    """LayerNorm of each head's output without a bias; every head has a scale of its own."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        self.eps = config.norm_eps
        shape = (config.heads, config.value_head_dim)
        self.scale = weight(shape, ("heads", "head_dim"), ones)

    def __call__(self, x: Float[Array, "B P T H hv"]) -> Float[Array, "B P T H hv"]:
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, -1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return x * self.scale[...]


class ShortConvolution(nnx.Module):
    """silu of a causal convolution of each channel of q, k and v over the last few tokens."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        size = config.conv_size
        # As PyTorch begins a convolution of one input channel.
        init = uniform(-(size**-0.5), size**-0.5)
        for name, (axis, heads, head_dim) in projections(config).items():
            setattr(self, name, weight((size, heads, head_dim), (None, axis, "head_dim"), init))

    def __call__(
        self,
        qkv: list[Array],
        context: Context,
        before: tuple[Array, Array, Array] | None,
        begun: tuple[Array, Array, Array] | None,
    ) -> tuple[list[Array], tuple[Array, Array, Array]]:
        """Convolved q, k and v, and their last inputs; other arguments as for `convolve`."""
        taps, nothing = (self.q[...], self.k[...], self.v[...]), (None,) * 3
        results = [
            convolve(x, weights, context, *memory)
            for x, weights, *memory in zip(
                qkv, taps, before or nothing, begun or nothing, strict=True
            )
        ]
        outputs, inputs = zip(*results, strict=True)
        return [jax.nn.silu(y) for y in outputs], inputs


def projections(config: ModelConfig) -> dict[str, Projection]:
    """What the shared projections of a recurrent mixer give."""
    return {
        "q": Projection("kv_heads", config.kv_heads, config.key_head_dim),
        "k": Projection("kv_heads", config.kv_heads, config.key_head_dim),
        "v": Projection("heads", config.heads, config.value_head_dim),
    }


class Recurrent(nnx.Module):
    """A mixer whose memory is one matrix for each value head."""

    convolved: ClassVar[bool] = False
    initial: ClassVar[Callable[..., StreamTransform]] = InitialState

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        for name, (axis, heads, head_dim) in projections(config).items():
            shape = (config.width, heads, head_dim)
            setattr(self, name, weight(shape, ("embed", axis, "head_dim")))
        shape = (config.heads, config.value_head_dim, config.width)
        self.o = weight(shape, ("heads", "head_dim", "embed"))
        if self.convolved:
            self.conv = ShortConvolution(config, weight)
        self.norm = self.make_norm(config, weight)
        self.streams = layer_transform(config, weight, projections(config), self.initial)

    def make_norm(self, config: ModelConfig, weight: WeightMaker) -> nnx.Module:
        """The norm of each head's output."""
        return HeadNorm(config, weight)

    def inputs(self) -> tuple[nnx.Param, ...]:
        """Weights `[D, ...]` whose products with the input `recurrence` is given."""
        return ()

    def recurrence(
        self, q: Array, k: Array, v: Array, inputs: list[Array], context: Context
    ) -> tuple[dict[str, Any], Float[Array, "B P T H hv"] | None]:
        """Arguments of `linear_attention`, and what the normed output is multiplied with."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "B P T D"], context: Context, cache: RecurrentCache | None = None
    ) -> tuple[Float[Array, "B P T D"], RecurrentCache | None]:
        """Mixes positions.

        Args:
          x: normed input of the layer.
          context: positions and documents of this pass.
          cache: what is remembered of the tokens before; None: nothing came before.

        Returns:
          the output, and the cache after the last token that is no padding (None for None).
        """
        return mix_after_soft_tokens(self.mix, x, context, cache)

    def mix(
        self,
        x: Float[Array, "B P T D"],
        context: Context,
        cache: RecurrentCache | None = None,
        start: RecurrentCache | None = None,
    ) -> tuple[Float[Array, "B P T D"], RecurrentCache]:
        """Output and memory of tokens without soft ones among them.

        Args:
          x, context: of these tokens.
          cache: as for a call.
          start: what documents start from, the same in every row; None: from the transform's state.
        """
        with jax.named_scope("qkv"):
            weights = (self.q, self.k, self.v, *self.inputs())
            q, k, v, *inputs = project(x, *(weight[...] for weight in weights))
            qkv = [self.streams.project(n, x, y) for n, y in (("q", q), ("k", k), ("v", v))]
            last = None
            if self.convolved:
                before, begun = (None if m is None else m.inputs for m in (cache, start))
                qkv, last = self.conv(qkv, context, before, begun)
            arguments, gate = self.recurrence(*qkv, inputs, context)
        with jax.named_scope("recurrence"):
            y, state = recur(
                **arguments,
                cached=cache is not None,
                segment_ids=context.segment_ids,
                initial_state=None if cache is None else cache.state,
                restart_state=restart_state(self.streams, None if start is None else start.state),
            )
        with jax.named_scope("out"):
            y = self.norm(y)
            y = (y if gate is None else y * gate.astype(y.dtype)).astype(x.dtype)
            out = self.o[...]
            y = project(y.reshape(*y.shape[:-2], -1), out.reshape(-1, out.shape[-1]))[0]
        return y, RecurrentCache(state, last)

    def init_state(self, config: ModelConfig, batch: int) -> RecurrentCache:
        """What `batch` rows remember before their first token: what the streams start from."""
        lead = (batch, config.streams)
        state = self.streams.state()
        if state is None:
            shape = (config.heads, config.key_head_dim, config.value_head_dim)
            state = jnp.zeros((config.streams, *shape))
            if issubclass(self.initial, NormalizedInitialState):
                state = NormalizedState(state, state[..., 0], state[..., 0, 0])
        state = jax.tree.map(lambda part: jnp.broadcast_to(part, (batch, *part.shape)), state)
        inputs = None
        if self.convolved:
            shapes = [(heads, head_dim) for _, heads, head_dim in projections(config).values()]
            inputs = tuple(
                jnp.zeros((*lead, config.conv_size - 1, *shape), config.dtype) for shape in shapes
            )
        return RecurrentCache(state, inputs)


def mix_after_soft_tokens(
    mix: Callable[..., tuple[Array, Any]], x: Float[Array, "B P T D"], context: Context, cache: Any
) -> tuple[Float[Array, "B P T D"], Any]:
    """Output and cache of a recurrent mixer, where soft tokens may stand before every row.

    The soft tokens are then a row of their own, and every document starts from what they leave.
    """
    if not context.soft:
        y, new = mix(x, context, cache)
        return y, None if cache is None else new
    of_soft, of_real = context.split()
    first, memory = mix(x[:, :, : context.soft], of_soft)
    y, _ = mix(x[:, :, context.soft :], of_real, start=memory)
    return jnp.concatenate([first, y], 2), None


def restart_state(streams: StreamTransform, start: Any) -> Any:
    """The state `[P, ...]` for documents to start from: of the memory `start`, or the streams'."""
    return streams.state() if start is None else jax.tree.map(lambda part: part[0], start)


def recur(q: Array, k: Array, v: Array, *, cached: bool, **arguments: Any) -> tuple[Array, Any]:
    """`pallas_kernels.linear_attention` of each device's own rows, streams and heads, and of its
    part of the positions where these lie over devices.

    Args:
      q, k, v, arguments: as for `linear_attention`.
      cached: a row goes on from a cache; every device then has all of its positions.
    """
    if not rules.is_sharded():
        return linear_attention(q, k, v, **arguments)
    if cached or sequence.parts() == 1:
        op, axes = sharded_linear_attention, (KEY_HEADS, VALUE_HEADS)
    else:
        op, axes = sequence_linear_attention, (PARTS_OF_KEY_HEADS, PARTS_OF_VALUE_HEADS)
    q_spec, v_spec = map(rules.partition_spec, axes)
    return op(q, k, v, q_spec=q_spec, v_spec=v_spec, **arguments)


def low_rank(
    weight: WeightMaker, config: ModelConfig, rank: int, head_dim: int
) -> tuple[nnx.Param, nnx.Param]:
    """The two weights of a projection to a vector for each value head through `rank` channels."""
    up = (rank, config.heads, head_dim)
    return (
        weight((config.width, rank), ("embed", "rank")),
        weight(up, ("rank", "heads", "head_dim")),
    )


def unit_norm(x: Float[Array, "... h"]) -> Float[Array, "... h"]:
    """x over its Euclidean norm, computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(jnp.square(wide), -1, keepdims=True) + 1e-6)).astype(
        x.dtype
    )
