"""Marks of branches in a training step: their loss and gradient against layers written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_models import random_params

from models.config import ModelConfig
from models.layers import apply_rope, rope_tables
from models.segments import Segment, lay_out
from parscale.config import Config, DataConfig, TrainConfig
from parscale.tasks import to_batch
from parscale.training import Training
from sharding.mesh import make_mesh

pytestmark = pytest.mark.usefixtures("little_optimization")

MODEL = ModelConfig(
    vocab_size=24, width=16, layers=1, heads=4, kv_heads=2, mlp_width=24, streams=2,
    transform="bias", branches=3,
)  # fmt: skip
LENGTH = 16
TEXT = lay_out([
    Segment((1, 2, 3)), Segment((4, 5, 6, 7), (0,)), Segment((8, 9), (0,)),
    Segment((10, 11, 12), (1, 2)),
])  # fmt: skip
SEES = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 1, 2, 3}}
MARKS = np.array([0, 1, 3, 0], np.int32)[TEXT.segments]  # nobody has the second mark


@pytest.fixture(scope="module")
def training():
    train = TrainConfig(schedule="constant", warmup_steps=0, clip_norm=0.0)
    config = Config(MODEL, data=DataConfig(length=LENGTH, batch=1), train=train)
    return Training(config, make_mesh(config.mesh, jax.devices()[:1]))


def make_batch():
    batch = to_batch([TEXT], [np.ones(len(TEXT.ids), bool)], LENGTH)
    return batch | {"branches": np.pad(MARKS, (0, LENGTH - len(MARKS)))[None]}


def step(training, params, batch):
    """The loss of the first step, and the gradient of the marks."""
    state, metrics = training.step(training.init(params), batch)
    moments = optax.tree.get(state.optimizer, "mu")["layers"]["mixer"]["branches"]
    return float(metrics["loss"]), np.asarray(moments) / (1 - training.config.train.b1)


def expected_loss(marks, graph, params):
    """The loss, given the marks `[L, branches, K, h]`, each stream's attention as one matrix."""
    layers = params["layers"]
    mixer = layers["mixer"] | {"branches": marks}
    model = nnx.merge(graph, params | {"layers": layers | {"mixer": mixer}}).unstack()
    groups, scale = MODEL.heads // MODEL.kv_heads, MODEL.head_dim**-0.5
    rope = rope_tables(TEXT.positions[None], MODEL.head_dim, MODEL.rope_theta)
    allowed = np.array([[s in SEES[t] for s in TEXT.segments] for t in TEXT.segments])
    allowed &= np.tri(len(allowed), dtype=bool)
    x = jnp.stack([model.embedding[...][TEXT.ids]] * MODEL.streams)
    for layer in model.layers:
        at, y = layer.mixer, layer.mixer_norm(x)
        q, k, v = (
            jnp.einsum("ptd,dnh->ptnh", y, getattr(at, name)[...])
            + getattr(at, f"{name}_bias")[...]
            + getattr(at.streams, name)[...][:, None]
            for name in "qkv"
        )
        for place, mark in enumerate(MARKS):
            if mark:
                learned = at.branches[...][mark - 1]
                k, v = (part.at[:, place].add(learned) for part in (k, v))
        q, k = (apply_rope(part[None], rope)[0] for part in (q, k))
        k, v = (jnp.repeat(part, groups, 2) for part in (k, v))
        scores = jnp.where(allowed, jnp.einsum("ptnh,psnh->pnts", q, k) * scale, -jnp.inf)
        out = jnp.einsum("pnts,psnh->ptnh", jax.nn.softmax(scores, -1), v)
        x = x + jnp.einsum("ptnh,nhd->ptd", out, at.o[...])
        x = x + layer.mlp(layer.mlp_norm(x))
    logits = model.logits(model.mix(model.norm(x)[None]))[0]
    # The next token of the same segment.
    asked = np.flatnonzero(TEXT.segments[1:] == TEXT.segments[:-1])
    losses = -jax.nn.log_softmax(logits)[asked, TEXT.ids[asked + 1]]
    return jnp.mean(losses)


def test_a_step_with_branches_against_layers_written_out(training):
    params = random_params(MODEL, seed=0, std=0.3)
    loss, gradient = step(training, params, make_batch())
    marks = params["layers"]["mixer"]["branches"]
    differentiate = jax.jit(jax.value_and_grad(expected_loss), static_argnums=1)
    expected, expected_gradient = differentiate(marks, training.graph, params)
    # The same float32 sums in another order.
    assert loss == pytest.approx(float(expected), rel=1e-5)
    size = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=1e-5 * size)
    assert (np.abs(gradient[:, [0, 2]]).max((2, 3)) > 0.01 * size).all()
    np.testing.assert_array_equal(gradient[:, 1], 0)


def test_marks_of_zero_say_nothing_until_they_have_learned(training):
    params = random_params(MODEL, seed=0, std=0.3)
    marks = params["layers"]["mixer"]["branches"]
    marked, plain = make_batch(), make_batch()
    del plain["branches"]
    without, gradient = step(training, params, plain)
    np.testing.assert_array_equal(gradient, 0)
    assert abs(step(training, params, marked)[0] - without) > 1e-3
    marks[:] = 0
    loss, gradient = step(training, params, marked)
    assert loss == pytest.approx(without, rel=1e-6)
    assert np.abs(gradient).max() > 0


def test_a_mark_that_the_model_has_not_is_no_number(training):
    batch = make_batch()
    batch["branches"][0, 4] = MODEL.branches + 1
    assert np.isnan(step(training, random_params(MODEL, seed=0, std=0.3), batch)[0])
