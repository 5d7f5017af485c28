"""The parallel-scaling language model: one set of weights, P streams, one mixed output."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.aggregation import make_aggregation
from models.attention import Attention
from models.config import ModelConfig
from models.context import Context
from models.layers import RMSNorm, SwiGLU, rope_tables
from models.transforms import SoftTokens, prefix_from_tokens
from models.weights import WeightMaker
from pallas_kernels import masks
from sharding import rules

STREAM_ACTIVATIONS = ("batch", "streams", "length", None)


class Layer(nnx.Module):
    """A pre-norm decoder layer: positions are mixed, then channels."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        self.mixer_norm = RMSNorm(config, weight)
        self.mixer = Attention(config, weight)
        self.mlp_norm = RMSNorm(config, weight)
        self.mlp = SwiGLU(config, weight)

    def __call__(
        self, x: Float[Array, "B P T D"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B P T D"], Any]:
        y, cache = self.mixer(self.mixer_norm(x), context, cache)
        x = rules.constrain(x + y, *STREAM_ACTIVATIONS)
        with jax.named_scope("mlp"):
            x = x + self.mlp(self.mlp_norm(x))
        return rules.constrain(x, *STREAM_ACTIVATIONS), cache


class LanguageModel(nnx.Module):
    """Token ids to logits, through P streams.

    The weights of the layers are stacked `[L, ...]` under `layers`; `unstack` gives the same model
    with a list of layers, which decodes faster on CPU.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        weight = WeightMaker(rngs, config.init_std)
        self.embedding = weight((config.vocab_size, config.width), ("vocab", "embed"))
        self.layers = Layer(config, WeightMaker(rngs, config.init_std, config.layers))
        self.norm = RMSNorm(config, weight)
        if not config.tied_embeddings:
            self.head = weight((config.width, config.vocab_size), ("embed", "vocab"))
        if config.streams > 1:
            self.aggregation = make_aggregation(config, weight)
            if config.transform == "soft_tokens":
                self.soft_tokens = SoftTokens(config, weight)
            if config.transform_init == "tokens":
                prefix_from_tokens(self, rngs.params())

    def __call__(
        self,
        ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
    ) -> Any:
        """Logits of the next token.

        Args:
          ids: token ids.
          positions: place of each token in its document; 0, 1, 2, ... by default. Given a cache,
            the positions of a row are consecutive and say where in the cache it goes on.
          segment_ids: documents of a row, which do not see each other, count from 1; 0 is padding.
          cache: what `init_cache` or an earlier call gave.

        Returns:
          float32 logits `[B, T, V]`; given a cache, a pair of them and the new cache.
        """
        x, new_cache = self.run_streams(
            ids, positions=positions, segment_ids=segment_ids, cache=cache
        )
        logits = self.logits(self.mix(x))
        return logits if cache is None else (logits, new_cache)

    def run_streams(
        self,
        ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B P T D"], Any]:
        """Each stream's output after the final norm, and the cache; arguments as for a call."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        # Rows gathered from a table that is whole along D come out split as `ids` are.
        x = rules.constrain(self.embedding[...], "vocab", None)[ids].astype(self.config.dtype)
        shape = (ids.shape[0], self.config.streams, *x.shape[1:])
        x = rules.constrain(jnp.broadcast_to(x[:, None], shape), *STREAM_ACTIVATIONS)
        if cache is not None:
            positions = positions + self._soft_length
            mask = masks.cached(positions, self._cache_length(cache))
            return self._decoder(x, positions, mask, None, cache)
        mask = masks.causal() if segment_ids is None else masks.packed(segment_ids)
        if not self._soft_length:
            return self._decoder(x, positions, mask, segment_ids, None)
        x, positions, mask = self._prepend_soft_tokens(x, positions, mask)
        y, _ = self._decoder(x, positions, mask, segment_ids, None)
        return y[:, :, self._soft_length :], None

    def mix(self, x: Float[Array, "B P T D"]) -> Float[Array, "B T D"]:
        """The aggregate of the streams; the only stream itself if P = 1."""
        with jax.named_scope("aggregation"):
            return x[:, 0] if self.config.streams == 1 else self.aggregation(x)

    def logits(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """The LM head, float32."""
        with jax.named_scope("head"):
            head = self.head_weight().astype(x.dtype)
            return jnp.einsum("...d,dv->...v", x, head, preferred_element_type=jnp.float32)

    def head_weight(self) -> Float[Array, "D V"]:
        """The LM head's matrix: the transposed embedding if they are tied."""
        return self.embedding[...].T if self.config.tied_embeddings else self.head[...]

    def init_cache(self, batch: int, length: int) -> Any:
        """A cache for `batch` rows of up to `length` tokens, as calls of this model expect it."""
        soft = self._soft_length
        caches = tuple(
            Attention.init_cache(self.config, batch, soft + length)
            for _ in range(self.config.layers)
        )
        cache = caches if self._unrolled else jax.tree.map(lambda *c: jnp.stack(c), *caches)
        if soft:
            x = jnp.broadcast_to(
                self.soft_tokens.tokens[...].astype(self.config.dtype),
                (batch, self.config.streams, soft, self.config.width),
            )
            positions = jnp.broadcast_to(jnp.arange(soft, dtype=jnp.int32), (batch, soft))
            mask = masks.cached(positions, soft + length)
            _, cache = self._decoder(x, positions, mask, None, cache)
        return cache

    def unstack(self) -> "LanguageModel":
        """The same model with one set of weights per layer instead of stacks."""
        if isinstance(self.layers, nnx.List):
            return self
        graph, rest = nnx.split(self)
        model = nnx.merge(graph, rest)
        model.layers = nnx.List([self._slice_layer(layer) for layer in range(self.config.layers)])
        return model

    @property
    def _unrolled(self) -> bool:
        loop = self.config.layer_loop
        if loop == "auto":
            loop = "unroll" if jax.default_backend() == "cpu" else "scan"
        return loop == "unroll" or isinstance(self.layers, nnx.List)

    @property
    def _soft_length(self) -> int:
        soft = self.config.streams > 1 and self.config.transform == "soft_tokens"
        return self.config.transform_size if soft else 0

    def _cache_length(self, cache: Any) -> int:
        return jax.tree.leaves(cache)[0].shape[-3]

    def _slice_layer(self, index: int) -> Layer:
        graph, stack = nnx.split(self.layers)
        return nnx.merge(graph, jax.tree.map(lambda array: array[index], nnx.to_pure_dict(stack)))

    def _prepend_soft_tokens(self, x, positions, mask):
        """The soft tokens stand at positions 0 ... M-1 before the real ones, which all see them."""
        soft = self._soft_length
        batch, streams, length, width = x.shape
        tokens = self.soft_tokens.tokens[...].astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(tokens, (batch, streams, soft, width)), x], 2)
        places = jnp.broadcast_to(jnp.arange(soft, dtype=positions.dtype), (batch, soft))
        positions = jnp.concatenate([places, positions + soft], 1)
        if mask.intervals is not None:
            start = jnp.arange(soft, dtype=jnp.int32)
            runs = jnp.stack([start, jnp.full((soft,), soft + length, jnp.int32)])
            runs = jnp.broadcast_to(runs, (*mask.intervals.shape[:-1], soft))
            intervals = jnp.concatenate([runs, mask.intervals + soft], -1)
            mask = masks.Mask(intervals=intervals, causal=mask.causal)
        return x, positions, mask

    def _decoder(self, x, positions, mask, segment_ids, cache):
        """All layers and the final norm."""
        context = Context(
            positions=positions,
            rope=rope_tables(positions, self.config.head_dim, self.config.rope_theta),
            mask=mask,
            segment_ids=segment_ids,
        )
        x, cache = self._run_layers(x, context, cache)
        return self.norm(x), cache

    def _run_layers(self, x, context, cache):
        def run(weights_graph, weights, x, cache):
            return nnx.merge(weights_graph, weights)(x, context, cache)

        if self.config.remat != "none":
            policy = {
                "full": jax.checkpoint_policies.nothing_saveable,
                "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
            }[self.config.remat]
            run = jax.checkpoint(run, policy=policy, static_argnums=0)
        if isinstance(self.layers, nnx.List) or self._unrolled:
            caches = []
            for index in range(self.config.layers):
                layer = (
                    self.layers[index]
                    if isinstance(self.layers, nnx.List)
                    else self._slice_layer(index)
                )
                graph, weights = nnx.split(layer)
                x, layer_cache = run(
                    graph, nnx.to_pure_dict(weights), x, None if cache is None else cache[index]
                )
                caches.append(layer_cache)
            return x, None if cache is None else tuple(caches)
        graph, stack = nnx.split(self.layers)

        def step(x, layer):
            weights, layer_cache = layer
            return run(graph, weights, x, layer_cache)

        return jax.lax.scan(step, x, (nnx.to_pure_dict(stack), cache))
