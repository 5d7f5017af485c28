"""Each recurrent mixer against its paper's formulas, in a prefill and in decoding after it."""

import dataclasses

import jax
import jax.numpy as jnp
import mixers_reference as reference
import numpy as np
import pytest
from flax import nnx
from random_models import SMALL

from models.config import RECURRENT
from models.context import Context
from models.layers import rope_tables
from models.mixers import MIXERS
from models.weights import WeightMaker

# With the customary epsilon, norms enlarge the roundings of small outputs a hundredfold.
CONFIG = dataclasses.replace(SMALL, streams=2, key_dim=6, value_dim=10, norm_eps=reference.NORM_EPS)
PROMPT, STEPS = 8, 3
REAL = np.array([8, 5])
"""Tokens of each row's prompt; padding stands behind them."""


def random_mixer(name: str):
    """A mixer in which every weight counts: its graph and its weights."""
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(lambda: MIXERS[name](CONFIG, WeightMaker(nnx.Rngs(0), 1.0)))
    graph, abstract = nnx.split(module)
    draw = lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32)
    return graph, jax.tree.map(draw, nnx.to_pure_dict(abstract))


@pytest.mark.parametrize("name", RECURRENT)
def test_the_output_is_that_of_the_published_formulas(name):
    graph, weights = random_mixer(name)
    shape = (2, CONFIG.streams, PROMPT + STEPS, CONFIG.width)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)

    @jax.jit
    def run(weights, x, positions, segment_ids, cache):
        rope = rope_tables(positions, CONFIG.key_head_dim, CONFIG.rope_theta)
        context = Context(positions, {CONFIG.key_head_dim: rope}, segment_ids=segment_ids)
        return nnx.merge(graph, weights)(x, context, cache)

    places = np.broadcast_to(np.arange(PROMPT, dtype=np.int32), (2, PROMPT))
    real = (places < REAL[:, None]).astype(np.int32)
    cache = nnx.merge(graph, jax.tree.map(jnp.asarray, weights)).init_state(CONFIG, 2)
    y, cache = run(weights, x[:, :, :PROMPT], places, real, cache)
    found = [[*row.swapaxes(0, 1)[:n]] for row, n in zip(np.asarray(y), REAL, strict=True)]
    for step in range(STEPS):
        token = x[:, :, PROMPT + step, None]
        place = (REAL + step)[:, None].astype(np.int32)
        y, cache = run(weights, token, place, np.ones_like(place), cache)
        for row, new in zip(found, np.asarray(y), strict=True):
            row.append(new[:, 0])

    formula = getattr(reference, name)
    weights = jax.tree.map(lambda array: np.asarray(array, np.float64), weights)
    for row, inputs, count in zip(found, x.astype(np.float64), REAL, strict=True):
        inputs = np.concatenate([inputs[:, :count], inputs[:, PROMPT:]], 1)
        expected = np.stack([formula(weights, inputs[p], p) for p in range(CONFIG.streams)], 1)
        error = np.sqrt(np.mean((np.stack(row) - expected) ** 2) / np.mean(expected**2))
        # Twice what the recurrence alone is allowed: projections and gates round too.
        assert error < 2e-6
