"""The parts of a Qwen2-family decoder layer that mix channels, not positions."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.weights import WeightMaker, ones
from sharding import rules

FEW_TOKENS = 128
"""Up to which weights are not joined: to copy them takes as long as the products."""


def project(x: Float[Array, "... D"], *weights: Array) -> list[Array]:
    """Products of `x` with weights `[D, *out]`, each `[..., *out]`, in the type of `x`.

    On one device all the weights go into one product over flat `[tokens, D]`: a left operand of
    more than two dimensions costs XLA on CPU a transposed copy for every weight gradient. On a mesh
    flattening would move data between devices, so there the axes stay.
    """
    if len(weights) > 1 and math.prod(x.shape[:-1]) <= FEW_TOKENS:
        return [project(x, weight)[0] for weight in weights]
    weights = [weight.astype(x.dtype) for weight in weights]
    if rules.is_sharded():
        return [jnp.tensordot(x, weight, 1) for weight in weights]
    width = x.shape[-1]
    flat = [weight.reshape(width, -1) for weight in weights]
    y = x.reshape(-1, width) @ (jnp.concatenate(flat, 1) if len(flat) > 1 else flat[0])
    borders = [0]
    for weight in flat:
        borders.append(borders[-1] + weight.shape[1])
    return [
        y[:, start:stop].reshape(*x.shape[:-1], *weight.shape[1:])
        for start, stop, weight in zip(borders, borders[1:], weights, strict=False)
    ]


class RMSNorm(nnx.Module):
    """x / rms(x) times a learned scale, computed in float32 or wider (arXiv 1910.07467)."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        self.eps = config.norm_eps
        self.scale = weight((config.width,), ("embed",), ones)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + self.eps)
        return (y * self.scale[...]).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, weight: WeightMaker):
        width, hidden = config.width, config.mlp_width
        self.gate = weight((width, hidden), ("embed", "mlp"))
        self.up = weight((width, hidden), ("embed", "mlp"))
        self.down = weight((hidden, width), ("mlp", "embed"))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        gate, up = project(x, self.gate[...], self.up[...])
        return project(jax.nn.silu(gate) * up, self.down[...])[0]


def rope_tables(
    positions: Int[Array, "B T"], head_dim: int, theta: float
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Cosines and sines of the rotary position embedding (arXiv 2104.09864).

    They are float32, or float64 where jax has it (`jax_enable_x64`).
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=float) / head_dim)
    angles = positions[..., None].astype(frequencies.dtype) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(
    x: Float[Array, "B P T H h"],
    tables: tuple[Float[Array, "B T half"], Float[Array, "B T half"]],
) -> Float[Array, "B P T H h"]:
    """`x` rotated by its positions; the first half of a head pairs with the second, as in Qwen2."""
    cos, sin = (table[:, None, :, None, :] for table in tables)
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, -1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)
    return rotated.astype(x.dtype)
