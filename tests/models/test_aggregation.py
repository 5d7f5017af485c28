"""The weights of the streams: positive, smoothed, summing to 1, in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_reference as reference
from flax import nnx
from random_models import SMALL, make_model

from models.weights import StreamParam

FOUR = dataclasses.replace(SMALL, streams=4)


def streams_output(scale: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (scale * rng.normal(size=(2, 4, 7, SMALL.width))).astype(np.float32)


def make_aggregation(kind: str, smoothing: float = 0.1):
    return make_model(dataclasses.replace(FOUR, aggregation=kind, smoothing=smoothing)).aggregation


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["dynamic", "constant", "mean"])
def test_weights_sum_to_one_and_keep_their_share(kind, smoothing, scale):
    weights = np.asarray(make_aggregation(kind, smoothing).weights(streams_output(scale)))
    assert weights.dtype == np.float32
    assert weights.shape == (2, 7, 4)
    # Four float32 roundings.
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=0, atol=3e-7)
    assert weights.min() >= smoothing / 4 - 1e-8
    if kind == "mean" or smoothing == 1.0:
        np.testing.assert_allclose(weights, 0.25, rtol=1e-6)
    elif kind == "dynamic" and scale > 1:
        # Certain of one stream: the others have what smoothing gives them.
        np.testing.assert_allclose(weights.min(), smoothing / 4, atol=1e-6)


def test_dynamic_weights_against_numpy():
    aggregation = make_aggregation("dynamic", 0.2)
    x = streams_output()
    hidden, hidden_bias, out, out_bias = (
        np.asarray(getattr(aggregation, name)[...], np.float64)
        for name in ("hidden", "hidden_bias", "out", "out_bias")
    )
    logits = sum(x[:, p].astype(np.float64) @ hidden[p] for p in range(4)) + hidden_bias
    weights = 0.8 * reference.softmax(reference.silu(logits) @ out + out_bias) + 0.05
    np.testing.assert_allclose(aggregation.weights(x), weights, rtol=1e-5, atol=1e-6)
    mixed = sum(weights[..., p : p + 1] * x[:, p] for p in range(4))
    np.testing.assert_allclose(aggregation(x), mixed, rtol=1e-5, atol=1e-5)


def test_constant_weights_are_the_softmax_of_what_is_learned():
    aggregation = make_aggregation("constant", 0.2)
    weights = 0.8 * reference.softmax(np.asarray(aggregation.bias[...], np.float64)) + 0.05
    found = np.asarray(aggregation.weights(streams_output()))
    np.testing.assert_allclose(found, np.broadcast_to(weights, found.shape), rtol=1e-6)


def test_the_mean_learns_nothing_and_averages():
    aggregation = make_aggregation("mean")
    assert not jax.tree.leaves(nnx.state(aggregation, StreamParam))
    x = streams_output()
    np.testing.assert_allclose(aggregation(x), x.mean(1), rtol=1e-5, atol=1e-6)


def test_bfloat16_streams_get_float32_weights():
    aggregation = make_aggregation("dynamic")
    x = streams_output()
    rounded = jnp.asarray(x, jnp.bfloat16)
    weights = aggregation.weights(rounded)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(weights).sum(-1), 1, rtol=0, atol=3e-7)
    mixed = aggregation(rounded)
    assert mixed.dtype == jnp.bfloat16
    # One rounding of the sum, of at most 2^-8 of its value.
    exact = np.einsum("btp,bptd->btd", weights, np.asarray(rounded, np.float64))
    np.testing.assert_allclose(np.asarray(mixed, np.float64), exact, rtol=2**-8 + 1e-4, atol=1e-5)
