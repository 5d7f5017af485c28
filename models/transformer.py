"""The parallel-scaling language model: one set of weights, P streams, one mixed output."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.aggregation import make_aggregation
from models.block_cache import View, with_states, without_states
from models.config import ATTENTION, ModelConfig, check_forks
from models.context import Context
from models.layers import RMSNorm, SwiGLU, rope_tables
from models.mixers import MIXERS
from models.transforms import SoftTokens, prefix_from_tokens
from models.weights import WeightMaker
from pallas_kernels import masks
from pallas_kernels.masks import Mask
from sharding import rules

STREAM_ACTIVATIONS = ("batch", "streams", "length", None)


class Layer(nnx.Module):
    """A pre-norm decoder layer: positions are mixed, then channels."""

    def __init__(self, config: ModelConfig, weight: WeightMaker, mixer: str):
        self.mixer_norm = RMSNorm(config, weight)
        self.mixer = MIXERS[mixer](config, weight)
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

    The weights of the layers are stacked `[L, ...]` under `layers`; where several mixers take
    turns, there is one stack for each place in their pattern, `layers.<place>_<mixer>`. `unstack`
    gives the same model with a list of layers, which decodes faster on CPU.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        weight = WeightMaker(rngs, config.init_std)
        self.embedding = weight((config.vocab_size, config.width), ("vocab", "embed"))
        stacked = WeightMaker(rngs, config.init_std, config.layers // len(config.mixers))
        stacks = [Layer(config, stacked, mixer) for mixer in config.mixers]
        names = [f"{place}_{mixer}" for place, mixer in enumerate(config.mixers)]
        self.layers = stacks[0] if len(stacks) == 1 else nnx.Dict(zip(names, stacks, strict=True))
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
        mask: Mask | None = None,
        branches: Int[Array, "B T"] | None = None,
        cache: Any = None,
        view: View | None = None,
    ) -> Any:
        """Logits of the next token.

        Args:
          ids: token ids.
          positions: place of each token in its document; 0, 1, 2, ... by default. Given a cache,
            where the rows go on.
          segment_ids: documents of a row, which do not see each other, count from 1; 0 is padding.
            Given a cache, a row has one document, and its padding stands behind it.
          mask: who sees whom, in place of the causal order within documents (`models.segments`);
            for models of attention alone, and without a cache.
          branches: of tokens in branches beside each other the number of the branch, which chooses
            what `config.branches` learned of it; 0 outside of them, and by default. A number that
            it has not makes what follows NaN.
          cache: what an earlier call gave; at first the blocks and states (`with_states`) of
            `init_blocks` and `init_states`.
          view: what the rows see of the cache's blocks, and where their tokens go; None if no mixer
            is attention to all positions.

        Returns:
          float32 logits `[B, T, V]`; given a cache, a pair of them and the new cache.

        Raises:
          InputError: a mask for a model with other mixers than attention.
        """
        x, new_cache = self.run_streams(
            ids,
            positions=positions,
            segment_ids=segment_ids,
            mask=mask,
            branches=branches,
            cache=cache,
            view=view,
        )
        logits = self.logits(self.mix(x))
        return logits if cache is None else (logits, new_cache)

    def run_streams(
        self,
        ids: Int[Array, "B T"],
        *,
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Mask | None = None,
        branches: Int[Array, "B T"] | None = None,
        cache: Any = None,
        view: View | None = None,
    ) -> tuple[Float[Array, "B P T D"], Any]:
        """Each stream's output after the final norm, and the cache; arguments as for a call."""
        if mask is not None:
            check_forks(self.config)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
        # Rows gathered from a table that is whole along D come out split as `ids` are.
        # Laid out as it is stored first: of the gradient's sum a device then takes its part only.
        table = rules.constrain(self.embedding[...], "vocab", "embed")
        x = rules.constrain(table, "vocab", None)[ids].astype(self.config.dtype)
        shape = (ids.shape[0], self.config.streams, *x.shape[1:])
        x = rules.constrain(jnp.broadcast_to(x[:, None], shape), *STREAM_ACTIVATIONS)
        if cache is not None:
            positions = positions + self.soft_length
            if view is not None:
                mask = masks.causal() if mask is None else mask
                if view.key_positions is not None:
                    moved = view.key_positions + self.soft_length
                    view = dataclasses.replace(view, key_positions=moved)
            return self._decoder(x, positions, mask, segment_ids, branches, cache, view=view)
        if mask is None:
            mask = masks.causal() if segment_ids is None else masks.packed(segment_ids)
        if not self.soft_length:
            return self._decoder(x, positions, mask, segment_ids, branches, None)
        x, positions, mask, branches = self._prepend_soft_tokens(x, positions, mask, branches)
        y, _ = self._decoder(x, positions, mask, segment_ids, branches, None, self.soft_length)
        return y[:, :, self.soft_length :], None

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

    def init_blocks(self, blocks: int, slots: int) -> Any:
        """Blocks of `slots` tokens for each layer of attention, None for others."""

        def of_layer(index):
            mixer = self._layer(index).mixer
            is_attention = self.config.mixers[index % len(self.config.mixers)] == "attention"
            return mixer.init_blocks(self.config, blocks, slots) if is_attention else None

        return self._by_layer(of_layer)

    def init_states(self, batch: int) -> Any:
        """Of each layer what `batch` rows remember before any token; None for attention."""

        def of_layer(index):
            if self.config.mixers[index % len(self.config.mixers)] == "attention":
                return None
            return self._layer(index).mixer.init_state(self.config, batch)

        return self._by_layer(of_layer)

    def _by_layer(self, of_layer: Callable[[int], Any]) -> tuple:
        """What `of_layer` gives for each layer, stacked as the layers are."""
        caches = tuple(map(of_layer, range(self.config.layers)))
        if self._unrolled:
            return caches
        places = len(self.config.mixers)
        return tuple(
            jax.tree.map(lambda *parts: jnp.stack(parts), *caches[place::places])
            for place in range(places)
        )

    def write_soft_tokens(self, cache: Any, view: View) -> Any:
        """The cache after the soft tokens, which stand before the first token of every row."""
        soft = self.soft_length
        x = self.soft_tokens.tokens[...].astype(self.config.dtype)
        x = jnp.broadcast_to(x, (len(view.blocks), *x.shape))
        positions = jnp.broadcast_to(jnp.arange(soft, dtype=jnp.int32), (len(view.blocks), soft))
        return self._decoder(x, positions, masks.causal(), None, None, cache, view=view)[1]

    def stacks(self) -> list[Layer]:
        """The stacked layers, one stack for each place in the pattern of mixers."""
        return list(self.layers.values()) if isinstance(self.layers, nnx.Dict) else [self.layers]

    def unstack(self) -> "LanguageModel":
        """The same model with one set of weights per layer instead of stacks."""
        if isinstance(self.layers, nnx.List):
            return self
        graph, rest = nnx.split(self)
        model = nnx.merge(graph, rest)
        model.layers = nnx.List([self._layer(index) for index in range(self.config.layers)])
        return model

    @property
    def _unrolled(self) -> bool:
        loop = self.config.layer_loop
        if loop == "auto":
            loop = "unroll" if jax.default_backend() == "cpu" else "scan"
        return loop == "unroll" or isinstance(self.layers, nnx.List)

    @property
    def state_axis(self) -> int:
        """The axis of rows in what `init_states` gives."""
        return 0 if self._unrolled else 1

    @property
    def soft_length(self) -> int:
        """Soft tokens that stand before the first token of every row."""
        soft = self.config.streams > 1 and self.config.transform == "soft_tokens"
        return self.config.transform_size if soft else 0

    def _layer(self, index: int) -> Layer:
        if isinstance(self.layers, nnx.List):
            return self.layers[index]
        repeat, place = divmod(index, len(self.config.mixers))
        graph, stack = nnx.split(self.stacks()[place])
        return nnx.merge(graph, jax.tree.map(lambda array: array[repeat], nnx.to_pure_dict(stack)))

    def _prepend_soft_tokens(self, x, positions, mask, branches):
        """The soft tokens stand at positions 0 ... M-1 before the real ones, which all see them."""
        soft = self.soft_length
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
        if branches is not None:
            branches = jnp.pad(branches, ((0, 0), (soft, 0)))
        return x, positions, mask, branches

    def _decoder(self, x, positions, mask, segment_ids, branches, cache, soft=0, view=None):
        """All layers and the final norm."""
        config, length = self.config, x.shape[2]
        rotated = {config.head_dim} if set(config.mixers) & set(ATTENTION) else set()
        rotated |= {config.key_head_dim} if "retention" in config.mixers else set()
        window_mask = None
        if cache is None and "window" in config.mixers:
            window_mask = masks.sliding_window(length, config.window) & mask
        key_rope = None
        if view is not None and view.key_positions is not None:
            key_rope = rope_tables(view.key_positions, config.head_dim, config.rope_theta)
        context = Context(
            positions=positions,
            rope={h: rope_tables(positions, h, config.rope_theta) for h in rotated},
            mask=mask,
            window_mask=window_mask,
            segment_ids=segment_ids,
            branches=branches,
            view=view,
            key_rope=key_rope,
            soft=soft,
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

        def run_all(graphs, x, weights, caches):
            """Layers one after the other, and their new caches."""
            new = []
            for graph, layer, layer_cache in zip(graphs, weights, caches, strict=True):
                x, layer_cache = run(graph, layer, x, layer_cache)
                new.append(layer_cache)
            return x, tuple(new)

        unrolled = self._unrolled
        layers = map(self._layer, range(self.config.layers)) if unrolled else self.stacks()
        graphs, weights = zip(*map(nnx.split, layers), strict=True)
        weights = tuple(map(nnx.to_pure_dict, weights))
        caches = (None,) * len(graphs) if cache is None else cache
        if unrolled:
            x, new = run_all(graphs, x, weights, caches)
        else:
            # Blocks are carried whole and written in place; a part for each step would be a copy.
            pools, states = without_states(caches)

            def step(carry, layers):
                x, pools = carry
                index, weights, states = layers
                held = tuple(pool and pool._replace(layer=index) for pool in pools)
                x, new = run_all(graphs, x, weights, with_states(held, states))
                pools, states = without_states(new)
                return (x, tuple(pool and pool._replace(layer=None) for pool in pools)), states

            count = self.config.layers // len(self.config.mixers)
            (x, pools), states = jax.lax.scan(
                step, (x, pools), (jnp.arange(count, dtype=jnp.int32), weights, states)
            )
            new = with_states(pools, states)
        return x, None if cache is None else new
