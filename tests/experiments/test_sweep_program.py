"""The sweep command: a small grid whole, stopped by a signal, gone on with, and bad input."""

import csv
import signal
import time

import pytest
import runs
from tiny_corpus import write_texts

from experiments import program, scaling_law

pytestmark = pytest.mark.usefixtures("compiler")

GRID = """
from models.config import ModelConfig
from parscale.config import Config, DataConfig, TrainConfig
from parscale.sweep import Point, Sweep, product, values

BASE = Config(
    model=ModelConfig(**{model}),
    data=DataConfig(**{data}),
    train=TrainConfig(**{train}),
)


def get_sweep():
    grid = product(values("model.streams", 1, 2, label="P"), values("train.seed", 0, label="s"))
    return Sweep(BASE, [*grid, Point("more", {{"model.streams": 2}}, after="P1-s0")])
"""


@pytest.fixture
def grid(tmp_path):
    texts = write_texts(tmp_path / "texts")
    data = runs.DATA | {"corpus": str(texts)}
    path = tmp_path / "grid.py"
    path.write_text(GRID.format(model=runs.MODEL, data=data, train=runs.TRAIN | {"steps": 20}))
    return path


def sweep(*words) -> int:
    with pytest.raises(SystemExit) as exit_:
        program.run(scaling_law.sweep, scaling_law.SWEEP, ["scaling_law", *map(str, words)])
    return exit_.value.code


def names(folder) -> list[str]:
    with (folder / "runs.csv").open(newline="") as file:
        return [row["run"] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_stopped_by_a_signal_and_gone_on_with(grid, tmp_path):
    folder = tmp_path / "sweep"
    words = ["sweep", f"--config={grid}", f"--workdir={folder}", "--only=P1-*", "--devices=1"]
    process = runs.start("scaling_law", *words, cache=tmp_path / "compiled")
    while not (folder / "P1-s0" / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    # Where the signal came after the last step, the run is whole; the sweep still says 143.
    assert process.returncode == 143
    assert "the same command goes on from here" in errors
    process = runs.start("scaling_law", *words, cache=tmp_path / "compiled")
    out, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "1 of 3 runs in" in out
    assert names(folder) == ["P1-s0"]


@pytest.mark.slow
def test_names_choose_runs_and_what_they_begin_from(grid, tmp_path, capsys):
    folder = tmp_path / "sweep"
    flags = f"--config={grid}", f"--workdir={folder}", "--devices=1"
    assert sweep(*flags, "--only=more") == 0
    assert names(folder) == ["P1-s0", "more"]
    assert sweep(*flags) == 0
    out = capsys.readouterr().out
    assert "2 of 3 runs were finished before" in out
    assert "3 of 3 runs in" in out
    assert names(folder) == ["P1-s0", "P2-s0", "more"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--config=none"], ["--config=none", "no such preset", "get_sweep()", "law_cpu"]),
        (["--config=law_cp"], ['"law_cpu"']),
        (["--config=tiny"], ["no get_sweep()"]),
        ([], ["--config is missing", "get_sweep()"]),
        (["--config=law_cpu", "--devices=0"], ["--devices=0", "at least 1"]),
        (["--config=law_cpu", "--devices=9"], ["--devices=9: there are 8"]),
        (["--config=law_cpu", "--only=P9*"], ["'P9*'", "s0-D32-P1"]),
    ],
)
def test_bad_input_is_one_line(words, expected, tmp_path, capsys):
    workdir = [] if words == [] else [f"--workdir={tmp_path / 'sweep'}"]
    assert sweep(*words, *workdir) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for word in expected:
        assert word in error
    assert not (tmp_path / "sweep").exists()
