"""The attention mixer: grouped-query attention with a key/value cache and per-stream prefixes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.context import Context
from models.layers import apply_rope, project
from models.transforms import layer_transform
from models.weights import WeightMaker, zeros
from pallas_kernels import attention, sharded_attention
from pallas_kernels.masks import Mask
from sharding import rules

HEADS = ("batch", "streams", None, "heads", None)
KV_HEADS = ("batch", "streams", None, "kv_heads", None)


class KVCache(NamedTuple):
    """Keys (rotated) and values of the positions seen so far; slot s holds position s.

    Attributes:
      k, v: `[B, P, S, K, h]`.
    """

    k: Float[Array, "B P S K h"]
    v: Float[Array, "B P S K h"]

    def write(self, k: Array, v: Array, positions: Int[Array, "B T"]) -> "KVCache":
        """The cache with `k` and `v` `[B, P, T, K, h]` at slots `positions[b, 0]` and after."""

        def write_row(row, new, start):
            return jax.lax.dynamic_update_slice_in_dim(row, new.astype(row.dtype), start, axis=1)

        write_rows = jax.vmap(write_row)
        start = positions[:, 0]
        return KVCache(write_rows(self.k, k, start), write_rows(self.v, v, start))


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
        self.biased = config.qkv_bias
        if config.qkv_bias:
            self.q_bias = weight((heads, head_dim), ("heads", "head_dim"), zeros)
            self.k_bias = weight((kv_heads, head_dim), ("kv_heads", "head_dim"), zeros)
            self.v_bias = weight((kv_heads, head_dim), ("kv_heads", "head_dim"), zeros)
        self.streams = layer_transform(config, weight)

    def __call__(
        self, x: Float[Array, "B P T D"], context: Context, cache: KVCache | None = None
    ) -> tuple[Float[Array, "B P T D"], KVCache | None]:
        """Mixes positions.

        Args:
          x: normed input of the layer.
          context: positions and mask of this pass.
          cache: keys and values so far; None attends within `x` alone.

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
            q, k = apply_rope(q, context.rope), apply_rope(k, context.rope)
        if cache is not None:
            cache = cache.write(k, v, context.positions)
            k, v = cache
        with jax.named_scope("attention"):
            y = attend(q, k, v, context.mask, self.streams.prefix())
        with jax.named_scope("out"):
            out = self.o[...]
            y = y.reshape(*y.shape[:-2], -1)
            return project(y, out.reshape(-1, out.shape[-1]))[0], cache

    @staticmethod
    def init_cache(config: ModelConfig, batch: int, length: int) -> KVCache:
        """An empty cache of `length` slots for `batch` rows, in the type of activations."""
        shape = (batch, config.streams, length, config.kv_heads, config.head_dim)
        empty = jnp.zeros(shape, config.dtype)
        return KVCache(empty, empty)


def attend(
    q: Float[Array, "B P T H h"],
    k: Float[Array, "B P S K h"],
    v: Float[Array, "B P S K h"],
    mask: Mask,
    prefix: tuple[Array, Array] | None,
) -> Float[Array, "B P T H h"]:
    """`pallas_kernels.attention` of each device's own rows, streams and heads."""
    if prefix is not None:
        prefix = tuple(part.astype(q.dtype) for part in prefix)
    if not rules.is_sharded():
        return attention(q, k, v, mask, prefix=prefix)
    specs = {"q_spec": rules.partition_spec(HEADS), "kv_spec": rules.partition_spec(KV_HEADS)}
    return sharded_attention(q, k, v, mask, prefix=prefix, **specs)
