"""The report on the streams against a direct computation from the model's own outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_models
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel
from parscale import evaluation

ROWS, LENGTH, STREAMS = 3, 10, 3


@functools.cache
def make_model(streams: int = STREAMS) -> LanguageModel:
    config = ModelConfig(
        vocab_size=20, width=32, layers=1, heads=4, kv_heads=2, mlp_width=48, streams=streams,
        transform_size=4, layer_loop="scan",
    )  # fmt: skip
    return random_models.make_model(config, std=0.5)


def make_batches() -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    batches = []
    for _ in range(2):
        segments = np.where(np.arange(LENGTH) < rng.integers(3, LENGTH, (ROWS, 1)), 1, 2)
        starts = (segments == 1).sum(1, keepdims=True)
        place = np.arange(LENGTH)
        batches.append(
            {
                "ids": rng.integers(0, 20, (ROWS, LENGTH), dtype=np.int32),
                "targets": rng.integers(0, 20, (ROWS, LENGTH), dtype=np.int32),
                "segment_ids": segments.astype(np.int32),
                "positions": np.where(segments == 1, place, place - starts).astype(np.int32),
                "mask": rng.integers(0, 2, (ROWS, LENGTH)).astype(np.float32),
            }
        )
    return batches


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.partial(jax.jit, static_argnums=0)
def run_streams(graph, params, ids, positions, segment_ids):
    model = nnx.merge(graph, params)
    return model.run_streams(ids, positions=positions, segment_ids=segment_ids)[0]


def counted_outputs(model: LanguageModel):
    """Float64 outputs `[P, n, D]` and targets `[n]` of the counted tokens of all batches."""
    graph, params = nnx.split(model)
    outputs, targets = [], []
    for batch in make_batches():
        x = run_streams(graph, params, batch["ids"], batch["positions"], batch["segment_ids"])
        counted = batch["mask"] == 1
        outputs.append(np.moveaxis(np.asarray(x, np.float64), 1, 0)[:, counted])
        targets.append(batch["targets"][counted])
    return np.concatenate(outputs, 1), np.concatenate(targets)


def test_figures_are_those_of_a_direct_computation():
    model = make_model()
    result = evaluation.report(model, make_batches(), 4)
    x, targets = counted_outputs(model)
    tokens = np.arange(len(targets))
    head = np.asarray(model.embedding[...], np.float64).T
    logs = log_softmax(x @ head)
    part = {name: np.asarray(value, np.float64) for name, value in nnx.to_pure_dict(
        nnx.state(model.aggregation)).items()}  # fmt: skip
    hidden = np.einsum("pnd,pde->ne", x, part["hidden"]) + part["hidden_bias"]
    hidden = hidden / (1 + np.exp(-hidden))
    weights = np.exp(log_softmax(hidden @ part["out"] + part["out_bias"])) * 0.9 + 0.1 / STREAMS
    mixed = log_softmax(np.einsum("np,pnd->nd", weights, x) @ head)
    best = logs.argmax(-1)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    assert result.tokens == len(targets)
    assert result.streams == STREAMS
    close(result.loss, -mixed[tokens, targets].mean())
    losses = -logs[:, tokens, targets].mean(1)
    close(result.stream_losses, losses)
    close(result.weights, weights.mean(0))
    close(result.weight_entropy, -(weights * np.log(weights)).sum(-1).mean())
    agreement = (best[:, None] == best[None]).mean(-1)
    close(result.agreement, agreement)
    close(result.gain, losses.min() + mixed[tokens, targets].mean())
    close(result.mean_agreement, (agreement.sum() - STREAMS) / (STREAMS * (STREAMS - 1)))
    assert not result.collapsed


def test_a_person_reads_the_same_figures():
    result = evaluation.report(make_model(), make_batches(), 100)
    text = evaluation.describe(result, 1.2345)
    for figure in (
        f"{result.loss:.4f} nats", f"{np.exp(result.loss):.3f}", "1.2345", f"{result.gain:+.4f}",
        f"{result.mean_agreement:.4f}", f"{result.weight_entropy:.4f} nats",
        *(f"{loss:.4f}" for loss in result.stream_losses),
        *(f"{weight:.4f}" for weight in result.weights),
    ):  # fmt: skip
        assert figure in text
    assert "WARNING" not in text


def test_streams_that_have_collapsed_are_pointed_out():
    model = nnx.merge(*nnx.split(make_model()))
    prefixes = model.layers.mixer.streams
    for weight in (prefixes.k, prefixes.v):
        weight[...] = jnp.broadcast_to(weight[...][:, :1], weight.shape)
    result = evaluation.report(model, make_batches(), 100)
    assert result.collapsed
    np.testing.assert_array_equal(result.agreement, 1)
    np.testing.assert_allclose(result.stream_losses, result.loss, rtol=1e-5)
    text = evaluation.describe(result, 1.0)
    assert "WARNING: the 3 streams have collapsed into one" in text
    assert "100.0%" in text


def test_one_stream_has_a_short_report():
    result = evaluation.report(make_model(1), make_batches(), 100)
    assert result.streams == 1
    assert result.gain == 0
    assert result.mean_agreement == 1
    assert not result.collapsed
    np.testing.assert_allclose(result.weights, [1])
    assert "stream" not in evaluation.describe(result, 1.0)


def test_nothing_to_evaluate_is_an_error():
    batches = [batch | {"mask": np.zeros_like(batch["mask"])} for batch in make_batches()]
    for nothing in ([], batches):
        with pytest.raises(ValueError, match="no token to evaluate"):
            evaluation.report(make_model(), nothing, 100)
