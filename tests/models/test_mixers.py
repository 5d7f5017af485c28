"""The recurrent mixers: against their papers' formulas, in pieces, across documents, on a mesh."""

import dataclasses
import functools
from typing import NamedTuple

import jax
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
PIECES = (3, 3, 1, 1)
LENGTH = sum(PIECES)
REAL = np.array([LENGTH, 5])
"""Tokens of each row; padding stands behind them."""


class Outputs(NamedTuple):
    """What a random mixer gives for rows of random input `[B, P, T, D]`."""

    weights: dict
    x: np.ndarray
    whole: np.ndarray
    in_pieces: np.ndarray


def context_of(positions: jax.Array, segment_ids: jax.Array | None) -> Context:
    rope = {CONFIG.key_head_dim: rope_tables(positions, CONFIG.key_head_dim, CONFIG.rope_theta)}
    return Context(positions, rope, segment_ids=segment_ids)


@functools.cache
def outputs(name: str) -> Outputs:
    rng = np.random.default_rng(0)
    module = nnx.eval_shape(lambda: MIXERS[name](CONFIG, WeightMaker(nnx.Rngs(0), 1.0)))
    graph, abstract = nnx.split(module)
    weights = jax.tree.map(
        lambda leaf: (0.5 * rng.normal(size=leaf.shape)).astype(np.float32),
        nnx.to_pure_dict(abstract),
    )
    x = rng.normal(size=(2, CONFIG.streams, LENGTH, CONFIG.width)).astype(np.float32)

    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (2, LENGTH))
    real = (places < REAL[:, None]).astype(np.int32)

    @jax.jit
    def run(weights, x, places, real=None, cache=None):
        return nnx.merge(graph, weights)(x, context_of(places, real), cache)

    whole, _ = run(weights, x, places)
    cache, parts = nnx.merge(graph, weights).init_cache(CONFIG, 2, LENGTH), []
    for end, size in zip(np.cumsum(PIECES), PIECES, strict=True):
        piece = slice(end - size, end)
        y, cache = run(weights, x[:, :, piece], places[:, piece], real[:, piece], cache)
        parts.append(y)
    return Outputs(weights, x, np.asarray(whole), np.concatenate(parts, 2))


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


@pytest.mark.parametrize("name", RECURRENT)
def test_the_output_is_that_of_the_published_formulas(name):
    found = outputs(name)
    weights, x = jax.tree.map(lambda a: np.asarray(a, np.float64), (found.weights, found.x))
    formula = getattr(reference, name)
    expected = np.array(
        [[formula(weights, x[b, p], p) for p in range(CONFIG.streams)] for b in range(len(x))]
    )
    assert rms(found.whole - expected) < 1e-6 * rms(expected)


@pytest.mark.parametrize("name", RECURRENT)
def test_pieces_and_single_tokens_with_a_cache_give_the_whole(name):
    found = outputs(name)
    for whole, pieces, real in zip(found.whole, found.in_pieces, REAL, strict=True):
        assert rms(whole[:, :real] - pieces[:, :real]) < 1e-6 * rms(whole)
