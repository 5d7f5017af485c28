"""Stream transforms: what each computes, and that it learns to make the streams differ."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_models import SMALL, make_model, random_ids, run_streams

from models.transformer import LanguageModel
from models.weights import StreamParam

# One stream against a model of its own: sums of the same float32 numbers in another order.
CLOSE = {"rtol": 1e-5, "atol": 5e-6}


def plain_stream(params: dict, mixer: dict | None = None, **changes) -> LanguageModel:
    """The plain model with the backbone of `params`, some of its weights replaced."""
    config = dataclasses.replace(SMALL, streams=1)
    layers = params["layers"]
    own = {name: array for name, array in layers["mixer"].items() if name != "streams"}
    backbone = {name: params[name] for name in ("embedding", "norm", "head")}
    backbone["layers"] = layers | {"mixer": own | (mixer or {})}
    if "embedding" in changes:
        rows = changes["embedding"].shape[0]
        config = dataclasses.replace(config, vocab_size=rows)
        changes["head"] = jnp.zeros((config.width, rows))
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, backbone | changes)


def test_low_rank_deltas_are_those_of_merged_weights():
    model = make_model(dataclasses.replace(SMALL, transform="low_rank"))
    params = nnx.to_pure_dict(nnx.state(model))
    ids = random_ids(SMALL, 2, 9)
    x = run_streams(model, ids)
    mixer = params["layers"]["mixer"]
    own = mixer["streams"]
    for p in range(SMALL.streams):
        merged = {
            name: mixer[name]
            + jnp.einsum("ldr,lrnh->ldnh", own[f"{name}_down"][:, p], own[f"{name}_up"][:, p])
            for name in ("q", "v")
        }
        alone = run_streams(plain_stream(params, merged), ids)
        np.testing.assert_allclose(x[:, p], alone[:, 0], **CLOSE)


def test_stream_biases_add_to_the_shared_ones():
    model = make_model(dataclasses.replace(SMALL, transform="bias"))
    params = nnx.to_pure_dict(nnx.state(model))
    ids = random_ids(SMALL, 2, 9)
    x = run_streams(model, ids)
    mixer = params["layers"]["mixer"]
    for p in range(SMALL.streams):
        merged = {f"{c}_bias": mixer[f"{c}_bias"] + mixer["streams"][c][:, p] for c in "qkv"}
        alone = run_streams(plain_stream(params, merged), ids)
        np.testing.assert_allclose(x[:, p], alone[:, 0], **CLOSE)


def test_soft_tokens_are_tokens_before_the_real_ones():
    model = make_model(dataclasses.replace(SMALL, transform="soft_tokens"))
    params = nnx.to_pure_dict(nnx.state(model))
    ids = random_ids(SMALL, 2, 9)
    x = run_streams(model, ids)
    size = SMALL.transform_size
    new = np.broadcast_to(SMALL.vocab_size + np.arange(size, dtype=np.int32), (2, size))
    longer = np.concatenate([new, ids], 1)
    for p in range(SMALL.streams):
        embedding = jnp.concatenate([params["embedding"], params["soft_tokens"]["tokens"][p]])
        alone = run_streams(plain_stream(params, embedding=embedding), longer)
        np.testing.assert_allclose(x[:, p], alone[:, 0, size:], **CLOSE)


def test_equal_prefixes_make_equal_streams():
    model = make_model(SMALL)
    ids = random_ids(SMALL, 2, 9)
    apart = run_streams(model, ids)
    assert np.abs(apart[:, 0] - apart[:, 1]).max() > 0.1
    prefixes = model.layers.mixer.streams
    for weight in (prefixes.k, prefixes.v):
        weight[...] = jnp.broadcast_to(weight[...][:, :1], weight.shape)
    x = run_streams(model, ids)
    np.testing.assert_allclose(x, np.broadcast_to(x[:, :1], x.shape), rtol=1e-6, atol=1e-6)
    # The weights sum to 1, so the mixture is the stream.
    mixed = jax.jit(model.aggregation.__call__)(x)
    np.testing.assert_allclose(mixed, x[:, 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("transform", "aggregation", "mixers"),
    [
        ("prefix", "dynamic", ("attention",)),
        ("soft_tokens", "constant", ("attention",)),
        ("low_rank", "mean", ("attention",)),
        ("bias", "dynamic", ("attention",)),
        ("prefix", "mean", ("gated_delta_net", "mlstm_exp")),
        pytest.param("prefix", "mean", ("aaren", "gla"), marks=pytest.mark.slow),
        pytest.param("low_rank", "mean", ("kda", "aaren"), marks=pytest.mark.slow),
        pytest.param("bias", "mean", ("gla", "retention"), marks=pytest.mark.slow),
        pytest.param("soft_tokens", "mean", ("delta_net",), marks=pytest.mark.slow),
    ],
)
def test_streams_learn_to_differ(transform, aggregation, mixers):
    config = dataclasses.replace(
        SMALL,
        transform=transform,
        aggregation=aggregation,
        mixers=mixers,
        layers=len(mixers),
        layer_loop="scan",
    )
    graph, streams, backbone = nnx.split(make_model(config), StreamParam, ...)
    # As at the start of a run: small values, and low-rank deltas of zero.
    first = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (0.0 if path[-1].key.endswith("_up") else 0.1),
        nnx.to_pure_dict(streams),
    )
    backbone = nnx.to_pure_dict(backbone)
    ids = random_ids(SMALL, 4, 8)
    optimizer = optax.adam(1e-2)

    def loss(streams):
        model = nnx.merge(graph, streams, backbone)
        x, _ = model.run_streams(ids[:, :-1])
        logits = model.logits(model.mix(x))
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, 1:, None], -1)
        return -jnp.mean(picked), x

    @jax.jit
    def step(streams, state):
        (value, x), gradient = jax.value_and_grad(loss, has_aux=True)(streams)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(streams, updates), state, value, x

    learned, state, losses = first, optimizer.init(first), []
    for _ in range(7):
        learned, state, value, x = step(learned, state)
        losses.append(float(value))
    assert losses[-1] < losses[0]
    leaves = jax.tree_util.tree_flatten_with_path(first)[0]
    for (path, before), after in zip(leaves, jax.tree.leaves(learned), strict=True):
        moved = np.abs(after - before)
        # Each step moves a value by up to 1e-2; some turn back, or hardly matter.
        assert (moved > 1e-4).mean() > 0.8, path
    for p in range(1, config.streams):
        assert np.abs(x[:, p] - x[:, 0]).max() > 1e-3
