import re
import subprocess
import sys

import pytest

from experiments import prepare_data, program
from parscale import data
from parscale.config import DataConfig


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for i in range(60):
        (folder / f"{i:02}.txt").write_text(f"def f_{i}(x):\n    return x + {i}\n" * (i + 1))
    return folder


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        program.run(prepare_data.main, prepare_data.FLAGS, ["prepare_data", *map(str, arguments)])
    return exit_.value.code


def test_the_printed_fields_open_what_was_prepared(texts, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    folder = tmp_path / "out"
    assert run(f"--corpus={texts}", f"--folder={folder}", "--learn=300", "--held_out=0.2") == 0
    printed = capsys.readouterr().out
    fields = dict(re.findall(r"--config\.(\S+)=(\S+)", printed))
    config = DataConfig(
        corpus=fields["data.corpus"],
        tokenizer=fields["data.tokenizer"],
        held_out=float(fields["data.held_out"]),
        length=8,
    )
    opened = data.open_data(config, int(fields["model.vocab_size"]))
    assert opened.train_documents + opened.held_out_documents == 60
    assert f"{opened.train_tokens} tokens" in printed
    assert f"corpus hash {opened.corpus_hash}" in printed


def test_as_a_command(texts, tmp_path):
    command = [sys.executable, "-m", "experiments.prepare_data", f"--corpus={texts}"]
    done = subprocess.run(
        [*command, f"--folder={tmp_path / 'out'}", "--held_out=0.2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "preparing" in done.stderr
    assert "train with --config.data.corpus=" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--corpus is missing"),
        (["--corpus=pystdlib"], "--folder is missing"),
        (["--corpus=nowhere", "--folder={new}"], "corpus nowhere: no file is there"),
        (["--corpus={texts}", "--folder={texts}"], "is not empty"),
        (["--corpus={texts}", "--folder={new}", "--held_out=1.5"], "held_out=1.5: expected"),
        (["--corpus={texts}", "--folder={new}", "--learn=9", "--tokenizer=x"], "give only one"),
        (["--corpus={texts}", "--folder={new}", "--learn=9"], "--learn=9: expected at least 256"),
        (["--corpus={texts}", "--folder={new}", "--tokenizer=x.json"], "x.json: no such file"),
        (["--corpus={texts}", "--folder={file}/new"], "is a file; expected a folder"),
        (["--corpus={texts}", "--folder=gs://bucket/new"], "an address, not a folder"),
    ],
)
def test_refusals_are_one_line_before_any_work(texts, tmp_path, capsys, arguments, message):
    places = {"texts": texts, "new": tmp_path / "new", "file": next(texts.iterdir())}
    assert run(*(argument.format(**places) for argument in arguments)) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1]
    assert error[-1].startswith("error: ")
    assert not (tmp_path / "new").exists()
