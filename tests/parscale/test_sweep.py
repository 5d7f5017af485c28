"""Sweeps: grids as data, and their runs, which are done once however often they are asked for."""

import copy
import csv
import dataclasses
import random

import jax
import pytest

from models.config import ModelConfig
from parscale import flops, run, sweep
from parscale.config import Config, DataConfig, TrainConfig
from parscale.metrics import read_csv
from parscale.sweep import Point, Sweep, product, run_sweep, values, zipped
from parscale.training import Training
from sharding.settings import InputError

SEEDS = zipped(values("train.seed", 0, 1, label="s"), values("data.seed", 0, 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    words = random.Random(0)
    folder = tmp_path_factory.mktemp("texts")
    for number in range(20):
        lines = (f"x = {words.randrange(99)} + {words.randrange(9)}" for _ in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return Config(
        model=ModelConfig(
            width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, transform_size=4
        ),
        data=DataConfig(corpus=str(folder), length=32, batch=8, held_out=0.3),
        train=TrainConfig(
            steps=4, learning_rate=0.01, warmup_steps=1, log_every=1, eval_rows=8, sample_tokens=0,
            checkpoint_minutes=0.0, checkpoint_every=1, keep=1,
        ),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def compile_once(monkeypatch):
    """Runs of one model, rate and device share their compiled step."""
    made = {}

    def training(config, mesh):
        key = config.model, config.train.learning_rate, mesh
        made[key] = made.get(key) or Training(config, mesh)
        shared = copy.copy(made[key])
        shared.config = config
        return shared

    monkeypatch.setattr(run, "Training", training)


def read(folder):
    with (folder / sweep.TABLE).open(newline="") as file:
        return list(csv.DictReader(file))


def test_points_combine():
    streams = values("model.streams", 1, 2, label="P")
    points = product(values("model.width", 16, label="D"), streams, SEEDS)
    assert [point.name for point in points] == ["D16-P1-s0", "D16-P1-s1", "D16-P2-s0", "D16-P2-s1"]
    assert points[-1].fields == {
        "model.width": 16, "model.streams": 2, "train.seed": 1, "data.seed": 1,
    }  # fmt: skip
    with pytest.raises(ValueError, match="shorter"):
        zipped(streams, streams[:1])


def test_names_and_predecessors_are_checked(base):
    one = values("model.streams", 2, label="P")
    with pytest.raises(InputError, match="two runs of the sweep have the name P2"):
        Sweep(base, one + one)
    with pytest.raises(InputError, match="P2 begins after 'P1', which is no earlier run"):
        Sweep(base, [dataclasses.replace(one[0], after="P1"), Point("P1", {})])


def test_a_wrong_value_is_refused_before_anything_runs(base, tmp_path):
    points = values("model.streams", 1, 0, label="P")
    with pytest.raises(InputError, match=r"run P0: .*streams=0: expected at least 1"):
        run_sweep(Sweep(base, points), tmp_path / "sweep", jax.devices()[:1])
    assert not (tmp_path / "sweep").exists()


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_ends_as_if_never_stopped(base, tmp_path):
    points = product(values("model.streams", 2, label="P"), SEEDS)
    grid = Sweep(base, points)
    whole = run_sweep(grid, tmp_path / "whole", jax.devices()[:1], report=lambda line: None)
    asked = iter(range(100))
    parts = run_sweep(
        grid, tmp_path / "parts", jax.devices()[:1],
        should_stop=lambda: next(asked) > 6, report=lambda line: None,
    )  # fmt: skip
    assert 0 < len(parts) < len(points)
    assert [row["run"] for row in read(tmp_path / "parts")] == [row["run"] for row in parts]
    with pytest.raises(InputError, match="no run of the sweep is named 'P3-"):
        run_sweep(grid, tmp_path / "parts", jax.devices()[:1], only="P3-*")
    lines = []
    again = run_sweep(grid, tmp_path / "parts", jax.devices()[:2], report=lines.append)
    assert lines[0] == f"{len(parts)} of 2 runs were finished before"
    assert len(lines) == 1 + len(points) - len(parts)
    table = read(tmp_path / "parts")
    assert [row["run"] for row in table] == [point.name for point in points]
    for row, same, point in zip(again, whole, points, strict=True):
        assert row["loss"] == same["loss"], point.name
        model = grid.config(point, tmp_path).model
        assert row["params"] == flops.parameter_counts(model)["non_embedding"]
        assert (row["streams"], row["seed"]) == (model.streams, point.fields["train.seed"])
    assert len({row["loss"] for row in again}) == 2

    def trained(*_, **__):
        raise AssertionError("a finished run was trained again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "train", trained)
        assert run_sweep(grid, tmp_path / "parts", jax.devices()[:1], report=lambda _: None)
    other = dataclasses.replace(base, data=dataclasses.replace(base.data, length=16))
    with pytest.raises(InputError, match=r"P2-s0: .*data\.length: 32 in the workdir, 16 now"):
        run_sweep(Sweep(other, points), tmp_path / "parts", jax.devices()[:1])


def test_a_run_begins_with_the_weights_of_another(base, tmp_path):
    points = [Point("first", {}), Point("second", {}, after="first")]
    first, second = run_sweep(
        Sweep(base, points), tmp_path, jax.devices()[:2], report=lambda line: None
    )
    assert second["begins_from"] == "first"
    assert second["loss"] < first["loss"]
    losses = [read_csv(tmp_path / point.name)["loss"] for point in points]
    assert losses[1][0] < losses[0][0] - 0.1


def test_a_failed_run_is_named_and_the_others_are_kept(base, tmp_path):
    points = [Point("good", {}), Point("bad", {"data.corpus": str(tmp_path / "none")})]
    with pytest.raises(InputError, match=r"run bad: .*no file is there"):
        run_sweep(Sweep(base, points), tmp_path / "s", jax.devices()[:1], report=lambda _: None)
    assert [row["run"] for row in read(tmp_path / "s")] == ["good"]


@pytest.mark.slow
def test_a_run_that_diverges_does_not_keep_the_others_from_running(base, tmp_path):
    wild = {"train.learning_rate": 1e30, "train.max_bad_steps": 1}
    points = [Point("wild", wild), Point("after", {}, after="wild"), Point("good", {})]
    lines = []
    with pytest.raises(run.DivergedError, match=r"run wild: .*; run after: not run, after wild"):
        run_sweep(Sweep(base, points), tmp_path / "s", jax.devices()[:1], report=lines.append)
    assert [row["run"] for row in read(tmp_path / "s")] == ["good"]
    assert lines[0].startswith("wild: ")
