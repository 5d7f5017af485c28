"""The training step: the same on every mesh, in every number of parts, and after bad steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import random_params

from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from parscale.training import Training
from sharding.mesh import MeshConfig, make_mesh
from sharding.settings import InputError

ROWS, LENGTH = 8, 16
MODEL = ModelConfig(
    vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, streams=2,
    transform_size=4, layer_loop="scan",
)  # fmt: skip
DATA = DataConfig(length=LENGTH, batch=ROWS)
TRAIN = TrainConfig(
    steps=100, schedule="constant", warmup_steps=0, learning_rate=1e-2, loss_chunk=6, clip_norm=0.0
)
MATRICES = {
    "embedding", "q", "k", "v", "o", "gate", "up", "down", "aggregation.hidden", "aggregation.out",
}  # fmt: skip


def make_batch(seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of two documents and padding, with different numbers of counted tokens."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32)
    first = rng.integers(2, 8, (ROWS, 1))
    end = rng.integers(9, LENGTH + 1, (ROWS, 1))
    place = np.arange(LENGTH)
    segments = np.where(place < first, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(place < first, place, place - first).astype(np.int32)
    return {
        "ids": ids,
        "targets": rng.integers(0, 64, (ROWS, LENGTH), dtype=np.int32),
        "segment_ids": segments,
        "positions": positions,
        "mask": (segments > 0).astype(np.float32),
    }


def make_training(mesh: MeshConfig | None = None, *, model=None, data=None, **train) -> Training:
    """A run on `mesh` over all eight devices, or on a single one."""
    config = Config(
        model=dataclasses.replace(MODEL, **(model or {})),
        mesh=mesh or MeshConfig(),
        data=dataclasses.replace(DATA, **(data or {})),
        train=dataclasses.replace(TRAIN, **train),
    )
    devices = None if mesh else jax.devices()[:1]
    return Training(config, make_mesh(config.mesh, devices))


@functools.cache
def initial_params(streams: int = 2) -> dict:
    """NumPy weights that every run starts from."""
    return random_params(dataclasses.replace(MODEL, streams=streams), seed=1, std=0.1)


@functools.cache
def one_device() -> Training:
    return make_training()


def named_leaves(tree) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def adam(state):
    """The moments of AdamW in a training state."""
    found = [part for part in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(part)]
    assert len(found) == 1
    return found[0]


def is_adam(node) -> bool:
    return hasattr(node, "mu")


def first_gradient(training: Training) -> dict[str, np.ndarray]:
    """The gradient of the first step, which AdamW's first moment is a tenth of."""
    state, _ = training.step(training.init(initial_params()), make_batch())
    share = 1 - training.config.train.b1
    return {name: np.asarray(m) / share for name, m in named_leaves(adam(state).mu).items()}


@functools.cache
def losses_on(training: Training) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of three steps; checks the shardings after them."""
    state = training.init(initial_params())
    losses, norms = [], []
    for seed in range(3):
        state, metrics = training.step(state, make_batch(seed))
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    check_shardings(training, state)
    return losses, norms


def check_shardings(training: Training, state) -> None:
    expected = named_leaves(training.abstract.trainable)
    moments = adam(state)
    for tree in (state.trainable, moments.mu, moments.nu):
        for name, leaf in named_leaves(tree).items():
            assert leaf.sharding.is_equivalent_to(expected[name].sharding, leaf.ndim), name
    for leaf, wanted in zip(
        jax.tree.leaves(state), jax.tree.leaves(training.abstract), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)


FSDP = MeshConfig(data=1, fsdp=4, stream=2)
TENSOR = MeshConfig(data=2, fsdp=2, tensor=2)


@functools.cache
def on_mesh(mesh: MeshConfig, accumulate: int) -> Training:
    return make_training(mesh, accumulate=accumulate)


@functools.cache
def compiled_text(training: Training) -> str:
    """What the step is compiled to; the compiled form is then used for its steps as well."""
    with jax.set_mesh(training.mesh):
        lowered = training._step.lower(training.abstract, training.put(make_batch()))
    training._step = lowered.compile()
    return training._step.as_text()


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [(FSDP, 1), (TENSOR, 2)],
    ids=["fsdp-stream", "fsdp-tensor-accumulate"],
)
def test_every_mesh_gives_the_losses_of_one_device(mesh, accumulate):
    expected, expected_norms = losses_on(one_device())
    training = on_mesh(mesh, accumulate)
    compiled_text(training)
    losses, norms = losses_on(training)
    assert expected[2] != expected[0]
    # Sums over devices in another order; AdamW's first steps divide a gradient by its own size.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)


def test_parameters_are_spread_over_the_mesh():
    leaves = named_leaves(on_mesh(TENSOR, 2).abstract.trainable)
    specs = {name: tuple(leaf.sharding.spec) for name, leaf in leaves.items()}
    assert specs["layers.mixer.q"] == (None, "fsdp", "tensor", None)
    assert specs["layers.mlp.down"] == (None, "tensor", "fsdp")
    assert specs["embedding"] == ("tensor", "fsdp")
    assert specs["layers.mixer.streams.k"] == (None, "stream", "tensor", None, None)


def test_streams_on_devices_of_their_own_exchange_nothing_by_all_to_all():
    text = compiled_text(on_mesh(FSDP, 1))
    assert "all-reduce" in text
    assert "all-to-all" not in text


def test_a_step_moves_nothing_between_host_and_device():
    training = one_device()
    state = training.init(initial_params())
    state, _ = training.step(state, make_batch())
    placed = training.put(make_batch(1))
    with jax.transfer_guard("disallow"):
        state, metrics = training.step(state, placed)
    assert np.isfinite(float(metrics["loss"]))


@functools.cache
def clipped_in_parts() -> Training:
    return make_training(accumulate=4, clip_norm=0.25, schedule="cosine", warmup_steps=4)


def test_accumulated_gradients_are_those_of_the_whole_batch_and_clipped():
    counted = make_batch()["mask"].sum(1)
    assert len(set(counted)) > 2
    direct = first_gradient(one_device())
    parts = first_gradient(clipped_in_parts())
    norm = np.sqrt(sum(np.sum(np.square(gradient)) for gradient in direct.values()))
    assert norm > 0.25
    for name, gradient in direct.items():
        # Float32 sums in another order, of about 100 tokens.
        error = np.abs(parts[name] * norm / 0.25 - gradient).max()
        assert error <= 1e-6 * max(np.abs(gradient).max(), 0.1 * norm), name


def test_the_loss_is_the_mean_over_the_counted_tokens():
    training = one_device()
    state = training.init(initial_params())
    batch = make_batch()
    batch["mask"] *= np.random.default_rng(5).integers(0, 2, batch["mask"].shape)
    losses = np.asarray(training.evaluate(state, batch))
    assert losses.shape == (ROWS, LENGTH)
    assert losses.dtype == np.float32
    assert (losses[batch["mask"] == 0] == 0).all()
    _, metrics = training.step(state, batch)
    assert float(metrics["tokens"]) == batch["mask"].sum()
    np.testing.assert_allclose(
        float(metrics["loss"]), losses.sum() / batch["mask"].sum(), rtol=1e-6
    )


def test_padding_has_no_influence():
    training = one_device()
    state = training.init(initial_params())
    batch = make_batch()
    losses = np.asarray(training.evaluate(state, batch))
    padding = batch["segment_ids"] == 0
    changed = batch | {
        "ids": np.where(padding, 7, batch["ids"]).astype(np.int32),
        "targets": np.where(padding, 3, batch["targets"]).astype(np.int32),
    }
    np.testing.assert_array_equal(np.asarray(training.evaluate(state, changed)), losses)
    first = training.step(training.init(initial_params()), batch)[0]
    second = training.step(state, changed)[0]
    for name, leaf in named_leaves(first.trainable).items():
        # Rows of the embedding that only padding reads get no gradient either.
        np.testing.assert_array_equal(leaf, named_leaves(second.trainable)[name], err_msg=name)


def bits(tree) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_steps_that_are_not_finite_leave_everything_as_it_was():
    training = one_device()
    state, _ = training.step(training.init(initial_params()), make_batch())
    before = bits((state.trainable, state.optimizer))
    bad = make_batch(1)
    bad["mask"][0, 0] = np.nan
    for count in (1, 2):
        state, metrics = training.step(state, bad)
        assert bits((state.trainable, state.optimizer)) == before
        assert not np.isfinite(float(metrics["loss"]))
        assert (int(metrics["skipped"]), int(metrics["bad_streak"])) == (count, count)
    state, metrics = training.step(state, make_batch(2))
    assert bits((state.trainable, state.optimizer)) != before
    assert (int(metrics["skipped"]), int(metrics["bad_streak"])) == (2, 0)
    assert int(state.step) == 4
    state, metrics = training.step(state, bad)
    assert (int(metrics["skipped"]), int(metrics["bad_streak"])) == (3, 1)
    # What follows is what would have followed without the bad steps.
    clean = training.init(initial_params())
    for seed in (0, 2):
        clean, _ = training.step(clean, make_batch(seed))
    assert bits((clean.trainable, clean.optimizer)) == bits((state.trainable, state.optimizer))


def test_gradients_that_are_not_finite_are_skipped_too():
    training = one_device()
    state = training.init(initial_params())
    # The loss stays finite, the norm of its gradient overflows.
    bad = make_batch()
    bad["mask"] = 1e30 * (np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 2 - 0.5)
    bad["mask"] = bad["mask"].astype(np.float32)
    before = bits(state.trainable)
    state, metrics = training.step(state, bad)
    assert np.isfinite(float(metrics["loss"]))
    assert not np.isfinite(float(metrics["grad_norm"]))
    assert bits(state.trainable) == before
    assert int(metrics["skipped"]) == 1


def test_weight_decay_shrinks_matrices_alone():
    training = one_device()
    params = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), initial_params())
    zeros = jax.tree.map(np.zeros_like, params)
    state = training.optimizer.init(params)
    updates, _ = jax.jit(training.optimizer.update)(zeros, state, params)
    shrunk = {name for name, update in named_leaves(updates).items() if np.asarray(update).any()}
    ends = {name if name in MATRICES else name.rpartition(".")[2] for name in shrunk}
    assert ends == MATRICES
    assert not any("bias" in name or "scale" in name or "streams" in name for name in shrunk)
    shrink = np.asarray(named_leaves(updates)["layers.mixer.q"])
    np.testing.assert_allclose(shrink, -TRAIN.learning_rate * TRAIN.weight_decay, rtol=1e-5)


def test_a_skipped_step_does_not_advance_the_schedule():
    training = clipped_in_parts()
    state = training.init(initial_params())
    bad = make_batch() | {"mask": np.full((ROWS, LENGTH), np.nan, np.float32)}
    rates = []
    for batch in (make_batch(), make_batch(1), bad, make_batch(2)):
        state, metrics = training.step(state, batch)
        rates.append(float(metrics["learning_rate"]))
    np.testing.assert_allclose(rates, [0.0, 0.0025, 0.005, 0.005], atol=1e-9)


def test_streams_alone_learn_on_a_frozen_backbone_in_bfloat16():
    training = make_training(trainable="streams", model={"dtype": "bfloat16"})
    state = training.init(initial_params())
    frozen = bits(state.frozen)
    names = set(named_leaves(state.trainable))
    assert names == {
        "layers.mixer.streams.k", "layers.mixer.streams.v", "aggregation.hidden",
        "aggregation.hidden_bias", "aggregation.out", "aggregation.out_bias",
    }  # fmt: skip
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(state.trainable))
    moments = sum(leaf.nbytes for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim)
    assert set(named_leaves(adam(state).mu)) == names
    assert moments == 2 * weights
    losses = []
    for _ in range(8):
        state, metrics = training.step(state, make_batch())
        assert metrics["loss"].dtype == jnp.float32
        losses.append(float(metrics["loss"]))
    # Activations of two layers, each rounded to 2^-8 of its value at most.
    np.testing.assert_allclose(losses[0], losses_on(one_device())[0][0], rtol=5e-3)
    assert losses[-1] < losses[0] - 0.02
    assert bits(state.frozen) == frozen
    for tree in (state.params(), adam(state).mu, adam(state).nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
    model = training.model(state)
    assert model.config == training.config.model
    np.testing.assert_array_equal(model.embedding[...], initial_params()["embedding"])


def test_a_run_may_start_with_fewer_streams():
    training = make_training(model={"streams": 4}, trainable="streams")
    state = training.init(initial_params(2))
    given = named_leaves(initial_params(2))
    for name, leaf in named_leaves(state.params()).items():
        kept = np.asarray(leaf)[tuple(map(slice, given[name].shape))]
        assert kept.tobytes() == given[name].tobytes(), name
    new = np.asarray(state.trainable["layers"]["mixer"]["streams"]["k"])[:, 2:]
    assert 0.01 < new.std() < 0.03


@pytest.mark.parametrize(
    ("mesh", "settings", "words"),
    [
        (MeshConfig(data=3), {}, ("data=3", "8")),
        (MeshConfig(data=-1, tensor=3), {}, ("tensor=3", "3 devices", "8")),
        (MeshConfig(data=2, tensor=4), {}, ("layers.mixer.k", "'kv_heads'", "2", "4")),
        (MeshConfig(data=2, stream=4), {}, ("stream", "size 2", "4")),
        (MeshConfig(data=4, stream=2), {"model": {"streams": 1}}, ("model.streams", "1", "2")),
        (MeshConfig(data=4, sequence=2), {"data": {"length": 15}}, ("data.length", "15", "2")),
        (MeshConfig(data=8), {"data": {"batch": 12}}, ("data.batch", "12", "8")),
        (MeshConfig(data=8), {"accumulate": 2}, ("train.accumulate", "4", "8")),
    ],
)
def test_what_does_not_fit_a_mesh_is_refused_by_name(mesh, settings, words):
    with pytest.raises(InputError) as error:
        make_training(mesh, **settings)
    for word in words:
        assert word in str(error.value)
