"""Whole models whose positions lie over devices: by every scheme the loss and gradient of one."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sequence_cases import errors, on_mesh

from models.config import ModelConfig
from models.transformer import LanguageModel
from parscale.config import Config, DataConfig
from parscale.loss import token_losses
from parscale.training import Training
from sharding.mesh import MeshConfig, make_mesh

ROWS, LENGTH = 2, 24
pytestmark = pytest.mark.usefixtures("little_optimization")


def config(**changed):
    sizes = {
        "vocab_size": 64, "width": 32, "layers": 3, "heads": 4, "kv_heads": 4, "mlp_width": 48,
        "streams": 4, "transform_size": 4, "transform_std": 0.1, "init_std": 0.03,
        "mixers": ("attention", "delta_net", "mlstm_exp"), "layer_loop": "scan",
    }  # fmt: skip
    return ModelConfig(**sizes | changed)


def batch():
    """Ids, targets, documents that cross the borders of parts, and positions in them."""
    random = np.random.default_rng(0)
    ids, targets = random.integers(0, 64, (2, ROWS, LENGTH), dtype=np.int32)
    segments = np.stack([np.repeat([1, 2], [15, 9]), np.repeat([1, 2, 3, 0], [2, 9, 8, 5])])
    starts = np.stack([np.repeat([0, 15], [15, 9]), np.repeat([0, 2, 11, 19], [2, 9, 8, 5])])
    positions = np.arange(LENGTH) - starts
    return [jnp.asarray(x, jnp.int32) for x in (ids, targets, segments, positions)]


def open_gates(model):
    """Input gates of the mLSTM as open as a bias of 0 leaves them. They begin nearly shut; then the
    gradient of the forget gate is what is left of a sum that cancels, on any mesh."""
    for stack in model.stacks():
        if hasattr(stack.mixer, "input_bias"):
            stack.mixer.input_bias[...] = jnp.zeros_like(stack.mixer.input_bias[...])
    return model


def loss_and_gradient(config):
    graph, params = nnx.split(open_gates(LanguageModel(config, rngs=nnx.Rngs(0))))

    def loss(params, ids, targets, segments, positions):
        model = nnx.merge(graph, params)
        x, _ = model.run_streams(ids, positions=positions, segment_ids=segments)
        losses = token_losses(model.mix(x), model.head_weight(), targets, LENGTH)
        return jnp.sum(losses * (segments > 0)) / jnp.sum(segments > 0)

    return jax.jit(jax.value_and_grad(loss))(nnx.to_pure_dict(params), *batch())


@functools.cache
def expected(changed):
    return loss_and_gradient(config(**dict(changed)))


def check(axes, attention, state, **changed):
    wanted = expected(tuple(changed.items()))
    with on_mesh(attention, state, **axes):
        got = loss_and_gradient(config(**changed))
    found = errors(got, wanted)
    # Both are some 1e-6 off: so is a mesh of data=2, which changes the order of sums alone.
    assert max(found.values()) < 3e-6, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attention", "state"), [("gather", "gather"), ("heads", "steps"), ("ring", "gather")]
)
def test_schemes(attention, state):
    check({"sequence": 2}, attention, state)
    check({"sequence": 4}, attention, state)


@pytest.mark.slow
def test_on_a_mesh_of_four_axes():
    check({"stream": 2, "sequence": 2, "tensor": 2}, "auto", "auto")


@pytest.mark.slow
@pytest.mark.parametrize("mixers", [("window", "aaren", "kda"), ("retention", "gla", "attention")])
def test_other_mixers(mixers):
    check({"sequence": 4}, "ring", "steps", mixers=mixers, window=9)


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["soft_tokens", "bias"])
def test_other_transforms(transform):
    """Without the mLSTM, whose biases have gradients of few digits on any mesh."""
    mixers = ("attention", "delta_net")
    check({"sequence": 2}, "gather", "gather", transform=transform, mixers=mixers, layers=2)


@pytest.mark.parametrize(
    ("attention", "moves"), [("ring", "collective_permute"), ("heads", "all_to_all")]
)
def test_the_configuration_of_the_mesh_reaches_the_step(attention, moves):
    """The step's program, not compiled."""
    mesh = MeshConfig(data=1, sequence=2, sequence_attention=attention)
    model = config(mixers=("attention",))
    data = DataConfig(length=LENGTH, batch=ROWS)
    run = Config(model=model, data=data, mesh=mesh)
    training = Training(run, make_mesh(mesh, jax.devices()[:2]))
    names = ("ids", "targets", "segment_ids", "positions")
    rows = dict.fromkeys(names, jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32))
    rows["mask"] = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.float32)
    with jax.set_mesh(training.mesh):
        text = training._step.lower(training.abstract, rows).as_text()
    found = set(re.findall(r"stablehlo\.(collective_permute|all_to_all|all_gather)", text))
    assert found == {moves}
