"""Small models with random weights made by NumPy, and their compiled forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.block_cache import View, with_states
from models.config import ModelConfig
from models.transformer import LanguageModel

SMALL = ModelConfig(
    vocab_size=31, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, tied_embeddings=False,
    streams=3, transform_size=4,
)  # fmt: skip
TRANSFORMS = ("prefix", "soft_tokens", "low_rank", "bias")


def make_model(config: ModelConfig, seed: int = 0, std: float = 0.3) -> LanguageModel:
    """A model with the weights of `random_params`."""
    graph = nnx.graphdef(_abstract(config))
    return nnx.merge(graph, jax.device_put(random_params(config, seed, std)))


def random_params(config: ModelConfig, seed: int, std: float) -> dict:
    """NumPy weights of which every one counts, also those that are 0 or 1 at first."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (offset + std * rng.normal(size=leaf.shape)).astype(np.float32)

    weights = nnx.to_pure_dict(nnx.state(_abstract(config)))
    return jax.tree_util.tree_map_with_path(draw, weights)


def _abstract(config: ModelConfig) -> LanguageModel:
    return nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


def forward(model: LanguageModel, ids, **arguments):
    """What a call of the model gives, compiled."""
    graph, params = nnx.split(model)
    return jax.tree.map(np.asarray, _call(graph, params, ids, arguments))


def in_blocks(model: LanguageModel, batch: int, length: int, slots: int = 4):
    """A cache for rows of up to `length` tokens, each stream in blocks of its own.

    Returns:
      the cache, and a function of the positions `[B, T]` of a pass, and which of its tokens are
      real, that gives its view.
    """
    streams, soft = model.config.streams, model.soft_length
    count = -(-(soft + length) // slots)
    blocks = 1 + jnp.arange(batch * streams * count, dtype=jnp.int32)
    blocks = blocks.reshape(batch, streams, count)

    def places(at):
        at = jnp.broadcast_to(at[:, None], (batch, streams, at.shape[1]))
        return jnp.take_along_axis(blocks, at // slots, 2) * slots + at % slots

    def view(positions, real=True):
        at = soft + positions
        counts = jnp.clip(at[:, :1] - slots * jnp.arange(count, dtype=jnp.int32), 0, slots)
        counts = jnp.broadcast_to(counts[:, None], blocks.shape)
        real = jnp.broadcast_to(real, positions.shape)[:, None]
        return View(blocks, counts, jnp.where(real, places(at), 0))

    cache = with_states(
        model.init_blocks(1 + batch * streams * count, slots), model.init_states(batch)
    )
    if soft:
        at = jnp.broadcast_to(jnp.arange(soft, dtype=jnp.int32), (batch, soft))
        nothing = blocks[..., :0]
        cache = model.write_soft_tokens(cache, View(nothing, nothing, places(at)))
    return cache, view


def run_streams(model: LanguageModel, ids) -> np.ndarray:
    """Each stream's output `[B, P, T, D]`, compiled."""
    graph, params = nnx.split(model)
    return np.asarray(_run_streams(graph, params, ids))


@functools.partial(jax.jit, static_argnames="graph")
def _call(graph, params, ids, arguments):
    return nnx.merge(graph, params)(ids, **arguments)


@functools.partial(jax.jit, static_argnames="graph")
def _run_streams(graph, params, ids):
    return nnx.merge(graph, params).run_streams(ids)[0]
