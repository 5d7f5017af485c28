import csv
import re

import pytest
import runs

from experiments import recall

pytestmark = pytest.mark.usefixtures("compiler")

TINY = (
    "--length=8", "--keys=4", "--values=3", "--width=8", "--heads=1", "--key_dim=8",
    "--mlp_width=8", "--steps=2", "--batch=4", "--test_rows=10",
)  # fmt: skip


def test_table(tmp_path, capfd):
    path = tmp_path / "recall.csv"
    words = ["--layers=1", "--mixers=attention,retention", "--seeds=0,7", f"--csv={path}"]
    code = runs.call(recall, *TINY, *words)
    out, error = capfd.readouterr()
    assert code == 0, error
    header, *lines = out.splitlines()
    assert re.split("  +", header) == ["mixer", "seed 0", "seed 7", "mean", "time of a run"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["mixer"], row["seed"]) for row in rows] == [
        (mixer, seed) for mixer in ("attention", "retention") for seed in "07"
    ]
    for line, pair in zip(lines, (rows[:2], rows[2:]), strict=True):
        name, *each, mean, _ = line.split()
        found = [float(row["accuracy"]) for row in pair]
        assert name == pair[0]["mixer"]
        assert [float(text.rstrip("%")) / 100 for text in each] == pytest.approx(found, abs=6e-4)
        assert float(mean.rstrip("%")) / 100 == pytest.approx(sum(found) / 2, abs=6e-4)
    for row in rows:
        assert (row["length"], row["steps"], row["batch"]) == ("8", "2", "4")
        assert float(row["loss"]) > 0
        assert int(row["params"]) > 0
    assert "step 2/2" in error


def test_help(capfd):
    assert runs.call(recall, "--help") == 0
    out = capfd.readouterr().out
    for words in ("associative recall", "--mixers=attention,retention", "--csv", "--seeds=0,1"):
        assert words in out


@pytest.mark.parametrize(
    ("word", "messages"),
    [
        ("--mixers=attention,deltanet", ["error: mixers=deltanet", '"delta_net"']),
        ("--steps=0", ["error: steps=0: expected at least 1"]),
        ("--mixers=gla+kda+gla", ["layers=2 is not a multiple of the 3 names"]),
        ("--mixers=", ["--mixers is empty"]),
        ("--seeds=0,one", ["--seeds=0,one", "whole numbers"]),
        ("--seeds=1,1", ["--seeds=1,1", "different"]),
        ("--seeds=", ["--seeds="]),
        ("--steps=many", ["--steps=many", "an integer"]),
        ("--step=3", ["--step", '"--steps"']),
        ("--length=255", ["length=255", "a power of 2"]),
        ("--keys=10", ["keys=10", "32 pairs"]),
        ("--width=63", ["width=63", "heads=2"]),
        ("--test_rows=7", ["--test_rows=7", "at least one batch"]),
        ("--csv=/nowhere/recall.csv", ["--csv=/nowhere/recall.csv", "No such file"]),
    ],
)
def test_bad_input(word, messages, capfd):
    error = runs.refusal(capfd, recall, word)
    for message in messages:
        assert message in error
