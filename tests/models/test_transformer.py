"""The model against an independent decoder, and the properties that every form of it must have."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_reference as reference
from flax import nnx
from random_models import SMALL, TRANSFORMS, forward, make_model, random_ids

from models import huggingface
from models.config import ModelConfig
from models.weights import StreamParam
from sharding.settings import InputError


@pytest.mark.parametrize("config", [reference.CONFIG, reference.PARSCALE], ids=["P1", "P3"])
def test_logits_are_those_of_an_independent_decoder(config, tmp_path):
    tensors = reference.random_tensors(config)
    model = huggingface.load(reference.write_directory(tmp_path, config, tensors))
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (2, 11), dtype=np.int32)
    expected = reference.logits(config, tensors, ids)
    # Float32 against float64: a few hundred roundings of 6e-8 on logits of size 3.
    np.testing.assert_allclose(forward(model, ids), expected, rtol=0, atol=2e-5)


def test_one_stream_is_the_plain_model_to_the_bit():
    plain = dataclasses.replace(SMALL, streams=1)
    model = make_model(plain)
    ids = random_ids(plain, 2, 9)
    expected = forward(model, ids)
    assert not jax.tree.leaves(nnx.state(model, StreamParam))
    for transform, aggregation in (("soft_tokens", "mean"), ("low_rank", "constant")):
        other = dataclasses.replace(
            plain, transform=transform, aggregation=aggregation, smoothing=0.7, transform_size=9
        )
        assert forward(make_model(other), ids).tobytes() == expected.tobytes()


def test_scanned_unrolled_and_unstacked_layers_give_the_same():
    ids = random_ids(SMALL, 2, 9)
    scanned = make_model(dataclasses.replace(SMALL, layer_loop="scan"))
    unrolled = make_model(dataclasses.replace(SMALL, layer_loop="unroll"))
    expected = forward(scanned, ids)
    np.testing.assert_allclose(forward(unrolled, ids), expected, rtol=1e-5, atol=1e-5)
    unstacked = scanned.unstack()
    np.testing.assert_allclose(forward(unstacked, ids), expected, rtol=1e-5, atol=1e-5)
    assert forward(unstacked.unstack(), ids).tobytes() == forward(unstacked, ids).tobytes()


def input_gradients(config: ModelConfig, length: int, read: int, **arguments) -> np.ndarray:
    """Largest gradient of each stream's output, and of the logits, at position `read` `[P + 1, T]`.

    Every position has a token id of its own, so that a row of the embedding's gradient belongs to
    one position; the LM head is not tied to it.
    """
    graph, params = nnx.split(make_model(config))
    params = nnx.to_pure_dict(params)
    ids = np.arange(length, dtype=np.int32)[None]

    def outputs(embedding):
        model = nnx.merge(graph, params | {"embedding": embedding})
        x, _ = model.run_streams(ids, **arguments)
        # A random direction: the sum over a normed vector would hide its gradient.
        ways = np.random.default_rng(3).normal(size=config.width).astype(np.float32)
        logits = model.logits(model.mix(x))[0, read]
        mixed = logits @ np.random.default_rng(4).normal(size=logits.shape).astype(np.float32)
        return jnp.append(x[0, :, read] @ ways, mixed)

    gradients = jax.jit(jax.jacrev(outputs))(params["embedding"])
    return np.abs(np.asarray(gradients)[:, :length]).max(-1)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_no_position_reads_a_later_one(transform):
    read = 6
    gradients = input_gradients(dataclasses.replace(SMALL, transform=transform), 10, read)
    assert gradients.shape == (4, 10)
    assert (gradients[:, read + 1 :] == 0).all()
    assert (gradients[:, : read + 1] > 1e-6).all()


SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
POSITIONS = np.array([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2]], np.int32)


@pytest.mark.parametrize("transform", ["prefix", "soft_tokens"])
def test_documents_of_a_row_do_not_see_each_other(transform):
    config = dataclasses.replace(SMALL, transform=transform)
    packed = {"segment_ids": SEGMENTS, "positions": POSITIONS}
    gradients = input_gradients(config, 10, 5, **packed)
    assert (gradients[:, 3:6] > 1e-6).all()
    assert (np.delete(gradients, np.s_[3:6], 1) == 0).all()


@pytest.mark.parametrize("transform", ["prefix", "soft_tokens"])
def test_packed_documents_are_computed_as_if_alone(transform):
    model = make_model(dataclasses.replace(SMALL, transform=transform))
    first, second = random_ids(SMALL, 1, 3), random_ids(SMALL, 1, 4, seed=1)
    padding = np.zeros((1, 3), np.int32)
    row = np.concatenate([first, second, padding], 1)
    packed = forward(model, row, segment_ids=SEGMENTS, positions=POSITIONS)
    assert np.isfinite(packed).all()
    alone = np.concatenate([forward(model, first), forward(model, second)], 1)
    np.testing.assert_allclose(packed[:, :7], alone, rtol=1e-5, atol=2e-5)
    # Other padding, and another first document, change nothing.
    row[:, 7:] = 5
    again = forward(model, row, segment_ids=SEGMENTS, positions=POSITIONS)
    np.testing.assert_array_equal(again[:, :7], packed[:, :7])
    row[:, :3] = (row[:, :3] + 1) % SMALL.vocab_size
    again = forward(model, row, segment_ids=SEGMENTS, positions=POSITIONS)
    np.testing.assert_array_equal(again[:, 3:7], packed[:, 3:7])


def test_rematerialisation_changes_no_loss_and_no_gradient():
    ids = random_ids(SMALL, 2, 9)
    results = []
    for remat, loop in (("none", "scan"), ("full", "scan"), ("dots", "unroll")):
        config = dataclasses.replace(SMALL, remat=remat, layer_loop=loop)
        graph, params = nnx.split(make_model(config))

        def loss(params, graph=graph):
            return jnp.mean(jax.nn.logsumexp(nnx.merge(graph, params)(ids), -1))

        results.append(jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(params)))
    for other in results[1:]:
        jax.tree.map(
            # What is computed again is compiled again: sums may be ordered otherwise.
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max()),
            other,
            results[0],
        )


def test_bfloat16_compute_keeps_float32_where_it_matters():
    exact = make_model(SMALL)
    model = make_model(dataclasses.replace(SMALL, dtype="bfloat16"))
    ids = random_ids(SMALL, 2, 9)
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)

    def loss(params):
        model = nnx.merge(graph, params)
        x, _ = model.run_streams(ids)
        logits = model.logits(model.mix(x))
        return jnp.mean(jax.nn.logsumexp(logits, -1)), (x, model.aggregation.weights(x), logits)

    (value, (x, weights, logits)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        params
    )
    assert x.dtype == jnp.bfloat16
    assert {value.dtype, weights.dtype, logits.dtype} == {jnp.dtype("float32")}
    for tree in (params, gradient):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    logits = np.asarray(logits)
    # The LM head accumulates in float32: its results are not rounded to bfloat16.
    assert (logits != logits.astype(jnp.bfloat16).astype(np.float32)).mean() > 0.9
    # About 30 roundings in a row, each of 2^-8 of a value at most, of random sign.
    expected = forward(exact, ids)
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.04 * np.sqrt(np.mean(expected**2))


def test_norms_are_computed_in_float32():
    config = dataclasses.replace(SMALL, dtype="bfloat16")
    norm = make_model(config).norm
    x = jnp.asarray(300 * np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    exact = reference.rms_norm(
        np.asarray(x, np.float64), np.asarray(norm.scale[...]), config.norm_eps
    )
    # One rounding at the end, of at most 2^-8 of the value, and float32 roundings.
    np.testing.assert_allclose(np.asarray(norm(x), np.float64), exact, rtol=2**-8 + 1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"width": 30}, ("width=30", "heads=4")),
        ({"kv_heads": 3}, ("heads=4", "kv_heads=3")),
        ({"width": 36}, ("head dimension of 9", "even")),
        ({"streams": 0}, ("streams=0", "at least 1")),
        ({"streams": -1}, ("streams=-1", "at least 1")),
        ({"smoothing": 1.5}, ("smoothing=1.5", "0 to 1")),
        ({"transform": "prefixes"}, ("prefixes", '"prefix"')),
    ],
)
def test_a_shape_that_cannot_be_is_refused(change, words):
    with pytest.raises(InputError) as error:
        dataclasses.replace(SMALL, **change)
    for word in words:
        assert word in str(error.value)


def test_configurations_are_read_without_jax():
    program = "import models.config, sharding.settings, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
