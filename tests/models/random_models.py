"""Small models with random weights made by NumPy, and their compiled forward pass."""

import functools

import jax
import numpy as np
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel

SMALL = ModelConfig(
    vocab_size=31, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, tied_embeddings=False,
    streams=3, transform_size=4,
)  # fmt: skip
TRANSFORMS = ("prefix", "soft_tokens", "low_rank", "bias")


def make_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A model in which every weight counts, also those that are 0 or 1 at first."""
    abstract = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    graph, weights = nnx.split(abstract)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        offset = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return (offset + 0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, nnx.to_pure_dict(weights))
    return nnx.merge(graph, jax.device_put(params))


def random_ids(config: ModelConfig, *shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, shape, dtype=np.int32)


def forward(model: LanguageModel, ids, **arguments):
    """What a call of the model gives, compiled."""
    graph, params = nnx.split(model)
    return jax.tree.map(np.asarray, _call(graph, params, ids, arguments))


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
