"""The two programs that train small models on text that forks and joins."""

import csv
import re
import signal

import pytest
import runs

from experiments import lookup, sums

pytestmark = pytest.mark.usefixtures("compiler")

TINY = ("--width=8", "--layers=1", "--heads=1", "--mlp_width=8", "--steps=2", "--batch=2")
TINY_SUMS = (*TINY, "--lists=2", "--digits=1", "--base=3", "--test_rows=4")
TINY_LOOKUP = (
    *TINY, "--documents=2", "--pairs=1", "--keys=4", "--values=3", "--counts=1,4",
    "--test_rows=4", "--validation_rows=2",
)  # fmt: skip


@pytest.fixture
def finish(tmp_path, capfd):
    """Runs a program to its end: its table, the rows of its CSV file, and what it told."""

    def run(program, *words):
        path = tmp_path / "table.csv"
        code = runs.call(program, *words, f"--csv={path}")
        out, error = capfd.readouterr()
        assert code == 0, error
        return table(out), read_csv(path), error

    return run


def table(out):
    header, *lines = (re.split("  +", line) for line in out.splitlines())
    return [dict(zip(header, line, strict=True)) for line in lines]


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_sums(finish):
    lines, rows, error = finish(sums, *TINY_SUMS, "--seeds=3")
    assert [(line["form"], line["learned positions"], line["written"]) for line in lines] == [
        ("sequential", "one", "one"),
        ("fork", "shared", "shared"),
        ("fork", "shared", "flat"),
        ("fork", "shared", "concatenated"),
        ("fork", "flat", "flat"),
        ("fork", "flat", "shared"),
    ]
    for line, row in zip(lines, rows, strict=True):
        assert [line[name] for name in ("form", "learned positions", "written")] == [
            row[name] for name in ("form", "learned", "written")
        ]
        assert float(line["seed 3"].rstrip("%")) / 100 == pytest.approx(float(row["accuracy"]))
        generated, longest = float(row["generated"]), float(row["longest"])
        assert float(line["ratio"]) == pytest.approx(generated / longest, abs=6e-3)
        assert (longest < generated) == (row["form"] == "fork")
        assert (row["seed"], row["steps"], row["lists"], row["base"]) == ("3", "2", "2", "3")
        assert float(row["loss"]) > 0
        assert int(row["params"]) > 0
    assert error.count("step 2/2") == 3


def test_lookup(finish):
    lines, rows, error = finish(lookup, *TINY_LOOKUP, "--seeds=3")
    readings = ("sequential", "parallel", "ape")
    # A tag, documents of 3 tokens, a tag and a key: all pairs of 9 and 18 tokens in a row, or of
    # each document with itself and the first tag and of the last two with all.
    pairs = {
        ("1", "sequential"): 21, ("1", "parallel"): 21, ("1", "ape"): 21,
        ("4", "sequential"): 120, ("4", "parallel"): 66, ("4", "ape"): 66,
    }  # fmt: skip
    assert [(line["documents"], line["reading"]) for line in lines] == [
        (count, reading) for count in "14" for reading in readings
    ]
    for line, row in zip(lines, rows, strict=True):
        of = (line["documents"], line["reading"])
        assert of == (row["documents_read"], row["reading"])
        assert int(line["pairs of query and key"]) == int(row["visible_pairs"]) == pairs[of]
        assert float(line["seed 3"].rstrip("%")) / 100 == pytest.approx(float(row["accuracy"]))
        factors = f"{row['temperature']}, {row['scale']}".replace("1.0", "1")
        assert line["temperature, scale"] == (factors if row["reading"] == "ape" else "-")
        assert (row["seed"], row["documents"], row["keys"]) == ("3", "2", "4")
    assert error.count("step 2/2") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words", "number", "reached", "least"),
    [
        ("sums", (*TINY_SUMS, "--steps=1000000"), signal.SIGTERM, "step 200/1000000", 0),
        ("sums", TINY_SUMS, signal.SIGINT, "fork shared, seed 0", 1),
        ("lookup", TINY_LOOKUP, signal.SIGTERM, "1 documents, sequential", 1),
    ],
)
def test_a_signal_ends_with_what_was_finished(name, words, number, reached, least, cache, tmp_path):
    path = tmp_path / "table.csv"
    process = runs.start(name, *words, "--seeds=0,1", f"--csv={path}", cache=cache)
    assert any(reached in line for line in process.stderr)
    process.send_signal(number)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "interrupted: the table is of what was finished"
    # What was going on may have come to its end, but nothing was begun after it.
    assert "seed" not in error
    lines, rows = table(out), read_csv(path)
    assert len(lines) == len(rows) in (least, least + 1)
    for line, row in zip(lines, rows, strict=True):
        assert float(line["seed 0"].rstrip("%")) / 100 == pytest.approx(float(row["accuracy"]))
        assert line["seed 1"] == "-"
        assert None not in (*row, *row.values())  # no part of a row


@pytest.mark.parametrize(("program", "words"), [(sums, TINY_SUMS), (lookup, TINY_LOOKUP)])
def test_help(program, words, capfd):
    assert runs.call(program, "--help") == 0
    out = capfd.readouterr().out
    for word in words:
        assert word.partition("=")[0] + "=" in out
    assert "--seeds=0,1" in out


@pytest.mark.parametrize(
    ("program", "word", "messages"),
    [
        (sums, "--seeds=0,one", ["--seeds=0,one", "whole numbers"]),
        (sums, "--lists=1", ["lists=1", "at least 2"]),
        (sums, "--width=63", ["width=63", "heads=4"]),
        (sums, "--test_rows=0", ["--test_rows=0", "at least 1"]),
        (sums, "--csv=/nowhere/sums.csv", ["--csv=/nowhere/sums.csv", "No such file"]),
        (lookup, "--counts=", ["--counts=", "numbers from 1 to 16"]),
        (lookup, "--counts=0,2", ["--counts=0,2", "numbers from 1 to 16"]),
        (lookup, "--counts=17", ["--counts=17", "keys=64"]),
        (lookup, "--documents=6", ["documents=6", "a power of 2"]),
        (lookup, "--keys=31", ["keys=31", "at least 32"]),
        (lookup, "--validation_rows=0", ["--validation_rows=0", "at least 1"]),
        (lookup, "--steps=0", ["steps=0", "at least 1"]),
    ],
)
def test_bad_input(program, word, messages, capfd):
    error = runs.refusal(capfd, program, word)
    for message in messages:
        assert message in error
