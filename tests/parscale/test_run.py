import copy
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from parscale import config_io, restart, run
from parscale.config import Config, DataConfig, TrainConfig
from parscale.metrics import read_csv
from parscale.training import Training
from sharding.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(
    width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, streams=2, transform_size=4
)
TRAIN = TrainConfig(
    steps=6, learning_rate=0.01, warmup_steps=2, schedule="constant", log_every=1, eval_rows=8,
    sample_tokens=0, checkpoint_minutes=0.0, max_bad_steps=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    words = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        lines = (f"x = {words.randrange(99)} + {words.randrange(9)}" for _ in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    text = DataConfig(corpus=str(folder), length=32, batch=8, held_out=0.3)
    return Config(model=MODEL, data=text, train=TRAIN)


@pytest.fixture(scope="module")
def compiled(config):
    return Training(config)


@pytest.fixture(autouse=True)
def compile_once(compiled, monkeypatch):
    """Runs that differ in free fields of `train` alone share one compiled step."""

    def training(config, mesh=None):
        shared = copy.copy(compiled)
        shared.config = config
        return shared

    monkeypatch.setattr(run, "Training", training)


def change(config, **fields):
    return config_io.replace(config, {f"train.{name}": value for name, value in fields.items()})


def saved(folder):
    return sorted(int(path.parent.name) for path in folder.glob("checkpoints/*/manifest.json"))


def stop_after(calls):
    """Answers yes from so many calls on, as an interruption would."""
    answers = iter([False] * calls)
    return lambda: next(answers, True)


def poison(monkeypatch, *bad):
    """Makes the loss of these steps NaN, as weights that are NaN would."""

    def step(self, state, batch):
        if int(state.step) + 1 not in bad:
            return good(self, state, batch)
        sound = jax.tree.map(jnp.copy, state.trainable)
        spoilt = jax.tree.map(lambda leaf: leaf * jnp.nan, state.trainable)
        state, metrics = good(self, dataclasses.replace(state, trainable=spoilt), batch)
        return dataclasses.replace(state, trainable=sound), metrics

    good = Training.step
    monkeypatch.setattr(Training, "step", step)


def test_the_record_of_examples_tells_order_and_batches_apart():
    def digest(*batches):
        record = restart.Record("corpus", 1)
        for rows in batches:
            record.consume(np.array(rows), 3)
        assert record.tokens == 3 * len(batches)
        return record.examples

    assert digest([1, 2], [3, 4]) == digest([1, 2], [3, 4])
    others = [digest([3, 4], [1, 2]), digest([1, 2, 3, 4]), digest([1, 2]), digest([2, 1], [3, 4])]
    assert len({digest([1, 2], [3, 4]), *others}) == 5


def test_a_run_that_is_stopped_goes_on_as_if_it_was_not(config, tmp_path):
    whole = run.train(config, tmp_path / "whole")
    folder = tmp_path / "run"
    for calls, step in ((0, 0), (2, 2), (1, 3), (0, 3)):
        assert run.train(config, folder, should_stop=stop_after(calls)) is None
        assert saved(folder)[-1] == step
        assert not (folder / "result.json").exists()
    resumed = run.train(config, folder)
    for name in ("weights_sha256", "examples_sha256", "tokens", "held_out_loss", "skipped_steps"):
        assert resumed[name] == whole[name]
    first, second = read_csv(tmp_path / "whole"), read_csv(folder)
    for name in ("step", "tokens", "loss", "learning_rate", "grad_norm", "held_out_loss"):
        assert first[name] == second[name]
    assert resumed["seconds"] >= second["seconds"][5] > second["seconds"][1]


def test_no_checkpoint_is_ahead_of_the_rows(config, tmp_path, monkeypatch):
    """A kill right after a save must not lose the row of the step that was saved."""
    steps = []

    def save(self, step, *args, **options):
        assert [row for row in read_csv(tmp_path)["step"]][-1] == step
        steps.append(step)
        return original(self, step, *args, **options)

    original = run.Checkpoints.save
    monkeypatch.setattr(run.Checkpoints, "save", save)
    run.train(change(config, checkpoint_every=2), tmp_path)
    assert steps == [2, 4, 6]


def test_evaluations_are_rows_of_their_own(config, tmp_path):
    result = run.train(change(config, eval_every=2, log_every=4), tmp_path)
    columns = read_csv(tmp_path)
    assert columns["step"] == [2, 4, 4, 6, 6]
    assert [loss is None for loss in columns["held_out_loss"]] == [False, True, False, True, False]
    assert [loss is None for loss in columns["loss"]] == [True, False, True, False, True]
    # The file has nine digits of each figure.
    assert columns["held_out_loss"][-1] == pytest.approx(result["held_out_loss"], rel=1e-8)


def test_checkpoints_by_time(config, tmp_path):
    run.train(change(config, checkpoint_minutes=1e-9, keep=4), tmp_path)
    assert saved(tmp_path) == [3, 4, 5, 6]


def test_a_bad_step_is_skipped_and_counted(config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 3, 4)
    result = run.train(config, tmp_path)
    assert result["skipped_steps"] == 2
    columns = read_csv(tmp_path)
    assert columns["skipped"][:6] == [0, 0, 1, 2, 2, 2]
    assert np.isfinite(result["held_out_loss"])
    error = capsys.readouterr().err
    assert "step 3: loss nan" in error
    assert "step 4: loss nan, gradient norm nan: skipped (2 in a row, 2 in all)" in error


def test_too_many_bad_steps_stop_the_run(config, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 4, 5)
    config = change(config, checkpoint_every=1)
    with pytest.raises(run.DivergedError, match="3 steps in a row up to step 5"):
        run.train(config, tmp_path)
    assert not (tmp_path / "result.json").exists()
    _, params, _ = restart.restore_params(tmp_path / "checkpoints")
    kept = params["layers"]["mixer"]["streams"]["k"]
    assert np.isfinite(kept).all()


def test_a_trace_of_the_steps_that_are_left(config, tmp_path):
    assert run.train(config, tmp_path, should_stop=stop_after(3)) is None
    assert run.train(config, tmp_path, profile_steps=(2, 5)) is not None
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size
    done = dataclasses.replace(config.train, steps=7)
    assert run.train(dataclasses.replace(config, train=done), tmp_path, profile_steps=(2, 5))
    assert len(list((tmp_path / "profile").rglob("*.xplane.pb"))) == 1


def test_a_mesh_without_its_stream_axis_has_the_same_devices_in_order():
    mesh = make_mesh(MeshConfig(fsdp=2, stream=4))
    plain = restart.without_stream_axis(mesh)
    assert dict(plain.shape) == dict(mesh.shape) | {"stream": 1, "expert": 4}
    assert list(plain.devices.flat) == list(mesh.devices.flat)
