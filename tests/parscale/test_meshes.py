"""Loss and every gradient are those of one device, on each axis of the mesh alone and on pairs."""

import functools
import itertools

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from parscale.training import Training
from sharding.mesh import MeshConfig, make_mesh

ROWS, LENGTH = 4, 16  # more than are computed one after the other
# The three kinds of mixers at once: one model is compiled for a mesh instead of three.
CONFIG = Config(
    model=ModelConfig(
        vocab_size=64, width=32, layers=3, heads=4, kv_heads=4, mlp_width=48, streams=4,
        mixers=("attention", "delta_net", "mlstm_exp"), transform_size=4, layer_loop="scan",
    ),
    data=DataConfig(length=LENGTH, batch=ROWS),
    train=TrainConfig(loss_chunk=6, clip_norm=0.0),
)  # fmt: skip
AXES = {"data": 4, "fsdp": 4, "stream": 4, "sequence": 2, "tensor": 2}


def make_batch() -> dict[str, np.ndarray]:
    """Rows of two documents and padding."""
    rng = np.random.default_rng(0)
    place = np.arange(LENGTH)
    first, end = rng.integers(2, 10, (ROWS, 1)), rng.integers(12, LENGTH + 1, (ROWS, 1))
    segments = np.where(place < first, 1, np.where(place < end, 2, 0)).astype(np.int32)
    return {
        "ids": rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32),
        "targets": rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32),
        "segment_ids": segments,
        "positions": np.where(place < first, place, place - first).astype(np.int32),
        "mask": (segments > 0).astype(np.float32),
    }


def training_on(devices: int, **axes: int) -> Training:
    mesh = MeshConfig(**{"data": 1} | axes)
    return Training(CONFIG, make_mesh(mesh, jax.devices()[:devices]))


@functools.cache
def initial_state():
    """Of every run, made once: to compile it for each mesh would take as long as the step."""
    training = training_on(1)
    return jax.tree.map(np.asarray, training.init())


def loss_and_gradient(training: Training) -> tuple[float, dict[str, np.ndarray]]:
    """Of the first step; AdamW's first moment is then a share of the gradient."""
    place = lambda array, like: jax.device_put(array, like.sharding)
    state = jax.tree.map(place, initial_state(), training.abstract)
    state, metrics = training.step(state, make_batch())
    moments = [part for part in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(part)]
    for tree in (moments[0].mu, moments[0].nu):
        for moment, weight in zip(
            jax.tree.leaves(tree), jax.tree.leaves(training.abstract.trainable), strict=True
        ):
            assert moment.sharding.is_equivalent_to(weight.sharding, moment.ndim)
    leaves = jax.tree_util.tree_leaves_with_path(moments[0].mu)
    share = 1 - CONFIG.train.b1
    gradient = {jax.tree_util.keystr(path): np.asarray(leaf) / share for path, leaf in leaves}
    return float(metrics["loss"]), gradient


def is_adam(node) -> bool:
    return hasattr(node, "mu")


@functools.cache
def expected() -> tuple[float, dict[str, np.ndarray]]:
    return loss_and_gradient(training_on(1))


def check(**axes: int) -> None:
    loss, gradient = loss_and_gradient(training_on(int(np.prod(list(axes.values()))), **axes))
    assert loss == pytest.approx(expected()[0], rel=1e-6)
    for name, wanted in expected()[1].items():
        error = rms(gradient[name] - wanted)
        # A gate that starts all but open or closed has a gradient of about 1e-5, itself the
        # difference of numbers around 1e-3: no more can be asked of it than of these.
        assert error <= 1e-6 * max(rms(wanted), 1e-4), name


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.usefixtures("little_optimization")
@pytest.mark.parametrize("axis", AXES)
def test_an_axis_alone(axis):
    check(**{axis: AXES[axis]})


@pytest.mark.slow
@pytest.mark.parametrize("pair", list(itertools.combinations(AXES, 2)), ids="-".join)
def test_a_pair_of_axes(pair):
    check(**dict.fromkeys(pair, 2))
