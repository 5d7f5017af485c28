"""The attention mixers: grouped-query attention, over all positions or a window, with prefixes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.block_cache import BlockPool, attend_view
from models.config import ModelConfig
from models.context import Context
from models.layers import apply_rope, project
from models.transforms import Projection, layer_transform
from models.weights import WeightMaker, zeros
from pallas_kernels import attention, sharded_attention
from pallas_kernels.masks import Mask
from sharding import rules, sequence
from sharding.sequence.attention import sequence_attention

HEADS = ("batch", "streams", None, "heads", None)
KV_HEADS = ("batch", "streams", None, "kv_heads", None)
PARTS_OF_HEADS = ("batch", "streams", "length", "heads", None)
PARTS_OF_KV_HEADS = ("batch", "streams", "length", "kv_heads", None)


class Attention(nnx.Module):
    """Softmax attention over positions, for every stream on its own."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        width, heads, kv_heads, head_dim = (
            config.width, config.heads, config.kv_heads, config.head_dim,
        )  # fmt: skip
        self.q = weight((width, heads, head_dim), ("embed", "heads", "head_dim"))
        self.k = weight((width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.v = weight((width, kv_heads, head_dim), ("embed", "kv_heads", "head_dim"))
        self.o = weight((heads, head_dim, width), ("heads", "head_dim", "embed"))
        self.theta = config.rope_theta
        self.biased = config.qkv_bias
        if config.qkv_bias:
            self.q_bias = weight((heads, head_dim), ("heads", "head_dim"), zeros)
            self.k_bias = weight((kv_heads, head_dim), ("kv_heads", "head_dim"), zeros)
            self.v_bias = weight((kv_heads, head_dim), ("kv_heads", "head_dim"), zeros)
        if config.branches:
            shape = (config.branches, kv_heads, head_dim)
            self.branches = weight(shape, ("slots", "kv_heads", "head_dim"), zeros)
        projections = {
            "q": Projection("heads", heads, head_dim),
            "k": Projection("kv_heads", kv_heads, head_dim),
            "v": Projection("kv_heads", kv_heads, head_dim),
        }
        self.streams = layer_transform(config, weight, projections)

    def __call__(
        self, x: Float[Array, "B P T D"], context: Context, cache: Any = None
    ) -> tuple[Float[Array, "B P T D"], Any]:
        """Mixes positions.

        Args:
          x: normed input of the layer.
          context: positions and mask of this pass.
          cache: keys and values so far; None attends within `x` alone. Of a `BlockPool` the
            context says what is seen.

        Returns:
          the output and the cache with this pass's keys and values written (None for None).
        """
        with jax.named_scope("qkv"):
            q, k, v = project(x, self.q[...], self.k[...], self.v[...])
            if self.biased:
                q = q + self.q_bias[...].astype(q.dtype)
                k = k + self.k_bias[...].astype(k.dtype)
                v = v + self.v_bias[...].astype(v.dtype)
            q = self.streams.project("q", x, q)
            k = self.streams.project("k", x, k)
            v = self.streams.project("v", x, v)
            if context.branches is not None and hasattr(self, "branches"):
                k, v = self.mark_branches(k, v, context.branches)
            kept = None if context.key_rope is None else apply_rope(k, context.key_rope)
            rope = context.rope[q.shape[-1]]
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        with jax.named_scope("attention"):
            if isinstance(cache, BlockPool):
                view, mask, prefix = context.view, context.mask, self.streams.prefix()
                y, cache = attend_view(q, k, v, cache, view, mask, prefix, self.theta, kept)
            else:
                k, v, mask, cache = self.remember(k, v, context, cache)
                y = attend(q, k, v, mask, self.streams.prefix(), cached=cache is not None)
        with jax.named_scope("out"):
            out = self.o[...]
            y = y.reshape(*y.shape[:-2], -1)
            return project(y, out.reshape(-1, out.shape[-1]))[0], cache

    def mark_branches(self, k: Array, v: Array, branches: Int[Array, "B T"]) -> tuple[Array, Array]:
        """Keys and values with what was learned of their branches (arXiv 2509.04475), 0 for none.

        Branches stand at the same positions; without it a token of one and that of another look
        alike to what joins them.
        """
        learned = jnp.pad(self.branches[...], ((1, 0), (0, 0), (0, 0)))
        # Not a number where a mark is none of these, so that it does not pass unseen.
        learned = jnp.take(learned.astype(k.dtype), branches, 0)[:, None]
        return k + learned, v + learned

    def remember(
        self, k: Array, v: Array, context: Context, cache: Any
    ) -> tuple[Array, Array, Mask, Any]:
        """Keys and values to attend to, who sees them, and what is kept of them after this pass."""
        return k, v, context.mask, None

    def init_blocks(self, config: ModelConfig, blocks: int, slots: int) -> BlockPool:
        """Blocks of `slots` tokens of one stream each, in the type of activations."""
        shape = (blocks, config.kv_heads, slots, config.head_dim)
        # Two arrays, so that both may be donated.
        return BlockPool(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


class WindowCache(NamedTuple):
    """Keys (rotated) and values of the last positions; slot s holds the last p with p % W = s.

    Attributes:
      k, v: `[B, P, W, K, h]`.
    """

    k: Float[Array, "B P W K h"]
    v: Float[Array, "B P W K h"]


class WindowAttention(Attention):
    """Softmax attention over the last positions, the own among them, and over the prefix."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        super().__init__(config, weight)
        self.window = config.window

    def remember(self, k, v, context, cache):
        if cache is None:
            return k, v, context.window_mask, None
        slots, new = cache.k.shape[2], k.shape[2]
        k, v = jnp.concatenate([cache.k, k], 2), jnp.concatenate([cache.v, v], 2)
        first, slot = context.positions[:, :1], jnp.arange(slots)
        held = _last_in_slot(first - 1, slot, slots)
        end = jnp.where(held >= 0, jnp.clip(held + self.window - first, 0, new), 0)
        token = jnp.broadcast_to(jnp.arange(new), (len(first), new))
        start = jnp.concatenate([jnp.zeros_like(end), token], 1)
        end = jnp.concatenate([end, jnp.minimum(token + self.window, new)], 1)
        mask = Mask(jnp.stack([start, end], 1)[:, None], queries=new)
        kept = _last_in_slot(first + context.real_tokens()[:, None] - 1, slot, slots)
        index = jnp.where(kept >= first, slots + kept - first, slot)[:, None, :, None, None]
        return k, v, mask, WindowCache(*(jnp.take_along_axis(x, index, 2) for x in (k, v)))

    def init_state(self, config: ModelConfig, batch: int) -> WindowCache:
        """No positions yet, for `batch` rows, in the type of activations."""
        slots = min(config.window, config.max_length)
        shape = (batch, config.streams, slots, config.kv_heads, config.head_dim)
        return WindowCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def _last_in_slot(position, slot, slots):
    """The last position up to `position` that a ring of `slots` holds in `slot`; negative: none."""
    return position - (position - slot) % slots


def attend(
    q: Float[Array, "B P T H h"],
    k: Float[Array, "B P S K h"],
    v: Float[Array, "B P S K h"],
    mask: Mask,
    prefix: tuple[Array, Array] | None,
    *,
    cached: bool = False,
) -> Float[Array, "B P T H h"]:
    """`pallas_kernels.attention` of each device's own rows, streams and heads, and of its part of
    the positions where these lie over devices.

    Args:
      q, k, v, mask, prefix: as for `attention`.
      cached: the keys are those of a cache, of which every device has all positions.
    """
    if prefix is not None:
        prefix = tuple(part.astype(q.dtype) for part in prefix)
    if not rules.is_sharded():
        return attention(q, k, v, mask, prefix=prefix)
    if cached or sequence.parts() == 1:
        op, axes = sharded_attention, (HEADS, KV_HEADS)
    else:
        op, axes = sequence_attention, (PARTS_OF_HEADS, PARTS_OF_KV_HEADS)
    q_spec, kv_spec = map(rules.partition_spec, axes)
    return op(q, k, v, mask, prefix=prefix, q_spec=q_spec, kv_spec=kv_spec)
