"""What training and evaluation refuse before any work: exit code 2, one line, the value named.

Sampling's and conversion's own refusals are tested beside them.
"""

import json
import shutil

import numpy as np
import pytest
import runs
from safetensors.numpy import load_file, save_file

from experiments import evaluate, sample, train
from models import huggingface

pytestmark = pytest.mark.usefixtures("compiler")

GOLDEN = "tests/data/parscale_p2"


def refused(capfd, texts, folder, *words, **changes):
    """The line with which training in `folder` is refused."""
    words = [*runs.arguments(texts, **changes), *words]
    return runs.refusal(capfd, train, f"--workdir={folder}", *words)


@pytest.mark.parametrize(
    ("word", "messages"),
    [
        ("--config.model.stream=4", ["--config.model.stream", '"--config.model.streams"']),
        ("--config.train.streams=4", ["--config.train.streams", '"--config.model.streams"']),
        ("--config.model.streams=four", ["--config.model.streams=four", "an integer"]),
        ("--config.train.learning_rate=high", ["train.learning_rate=high", "a finite number"]),
        ("--config.train.learning_rate=nan", ["train.learning_rate=nan", "a finite number"]),
        ("--config.model.qkv_bias=2", ["--config.model.qkv_bias=2", "true or false"]),
        ("--config.model.transform=prefixes", ["transform='prefixes'", '"prefix"']),
        ("--config.model.width=18", ["width=18", "heads=2", "head dimension"]),
        ("--config.model.heads=3", ["width=16", "heads=3"]),
        ("--config.model.kv_heads=3", ["heads=2", "kv_heads=3"]),
        ("--config.model.streams=0", ["streams=0", "at least 1"]),
        ("--config.model.streams=-1", ["streams=-1", "at least 1"]),
        ("--config.model.vocab_size=100", ["model.vocab_size=100", "256 tokens"]),
        ("--config.train.steps=0", ["steps=0", "at least 1"]),
        ("--config.train.accumulate=3", ["data.batch=8", "train.accumulate=3"]),
        ("--config.mesh.data=3", ["data=3", "8"]),
        ("--config.data.batch=4", ["data.batch", "4"]),
        ("--config.data.batch=1000000", ["fewer than one batch of 1000000"]),
        ("--config.data.held_out=0", ["held_out=0", "between 0 and 1"]),
        ("--config.data.seed=-1", ["data.seed=-1"]),
        ("--config.train.seed=5000000000", ["seed=5000000000", "2147483647"]),
        ("--config.data.tokenizer=byte", ["tokenizer byte", '"bytes"']),
        ("--config.data.corpus=pystdlb", ["pystdlb", '"pystdlib"']),
        ("--config.data.corpus={tmp}/none", ["{tmp}/none", "no file is there"]),
        ("--config.data.corpus={tmp}/empty", ["{tmp}/empty/a.txt", "the file is empty"]),
        ("--config.data.corpus={tmp}/latin", ["{tmp}/latin/a.txt", "not UTF-8 at byte 3"]),
        ("--config.data.corpus={tmp}/broken.jsonl", ["{tmp}/broken.jsonl, line 1", "not JSON"]),
        ("--config.data.corpus={tmp}/single", ["1 documents", "held_out=0.3"]),
        ("--config.train.init_from={tmp}/none", ["train.init_from={tmp}/none", "no such folder"]),
        ("--config.train.init_from={tmp}/empty", ["train.init_from={tmp}/empty", "no run there"]),
        ("--config.train.init_from=" + GOLDEN, ["train.init_from=" + GOLDEN, "width=64"]),
        ("--config.train.trainable=streams", ["train.trainable=streams", "init_from"]),
        ("--config=tny", ["--config=tny", '"tiny"']),
        ("--profile_steps=3", ["--profile_steps=3", "two steps"]),
        ("--profile_steps=3,2", ["--profile_steps=3,2", "two steps"]),
        ("--profile_steps=a,b", ["--profile_steps=a,b", "two steps"]),
        ("steps=3", ["steps=3", "--name=value"]),
    ],
)
def test_nothing_is_begun(word, messages, texts, tmp_path, capfd):
    for name, content in (("empty", b""), ("latin", b"caf\xe9"), ("single", b"text")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_bytes(content)
    (tmp_path / "broken.jsonl").write_text("{\n")
    line = refused(capfd, texts, tmp_path / "run", word.format(tmp=tmp_path))
    for message in messages:
        assert message.format(tmp=tmp_path) in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        ({"model__width": 32}, ["model.width: 16 in the workdir, 32 now"]),
        ({"model__mlp_width": 48, "data__length": 64}, ["model.mlp_width: 32", "data.length: 32"]),
        ({"train__learning_rate": 0.5}, ["train.learning_rate: 0.01 in the workdir, 0.5 now"]),
        ({"train__seed": 1}, ["train.seed: 0 in the workdir, 1 now"]),
        ({"data__corpus": "pystdlib"}, ["data.corpus: ", "pystdlib now"]),
        ({"model__streams": 4}, ["model.streams: 2 in the workdir, 4 now", "--grow_streams"]),
        ({"model__streams": 1}, ["model.streams: 2 in the workdir, 1 now", "can only grow"]),
    ],
)
def test_another_configuration_is_refused_by_the_names_of_its_fields(
    changes, messages, texts, two, capfd
):
    before = sorted(two.rglob("*"))
    line = refused(capfd, texts, two, **changes)
    for message in [*messages, "Go back to the old value, or give another --workdir"]:
        assert message in line
    assert sorted(two.rglob("*")) == before


def test_a_bucket_that_is_not_mounted_is_refused(texts, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert "gs:/bucket/run: an address, not a folder" in refused(capfd, texts, "gs://bucket/run")
    assert not any(tmp_path.iterdir())


def test_a_corpus_that_has_changed_is_refused(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    other = tmp_path / "texts"
    shutil.copytree(texts, other)
    config = json.loads((folder / "config.json").read_text())
    config["data"]["corpus"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    with (other / "00.txt").open("a") as file:
        file.write("one more line\n")
    line = refused(capfd, other, folder, train__steps=9)
    assert f"corpus {other} has other contents than when this run began" in line


def test_a_workdir_whose_files_are_not_ours_is_refused(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    (folder / "metrics.csv").write_text("a,b\n1,2\n")
    line = refused(capfd, texts, folder, train__steps=9)
    assert f"{folder / 'metrics.csv'} is not the record of a run" in line


def test_a_configuration_that_cannot_be_read_is_refused(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    (folder / "config.json").write_text('{"model": ')
    assert f"{folder / 'config.json'}: not a configuration in JSON" in refused(capfd, texts, folder)
    (folder / "config.json").unlink()
    line = refused(capfd, texts, folder)
    assert f"{folder} has checkpoints/ but no config.json" in line
    hugging = tmp_path / "hugging"
    shutil.copytree(GOLDEN, hugging)
    line = refused(capfd, texts, hugging)
    assert f"{hugging / 'config.json'}" in line


def test_a_checkpoint_directory_that_is_none_is_refused(texts, two, tmp_path, capfd):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "notes.txt").write_text("mine")
    line = refused(capfd, texts, folder)
    assert f"{folder / 'checkpoints'} is not a checkpoint directory (it has notes.txt)" in line
    shutil.copy(two / "config.json", folder)
    for program in (sample, evaluate):
        words = ["--prompt=x"] if program is sample else []
        line = runs.refusal(capfd, program, f"--workdir={folder}", *words)
        assert f"{folder / 'checkpoints'} is not a checkpoint directory" in line


def test_damage_is_named_and_the_checkpoint_before_is_used(two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    damaged = runs.flip_byte(folder / "checkpoints" / "8" / "trainable")
    capfd.readouterr()
    assert runs.call(evaluate, f"--workdir={folder}", "--rows=16") == 0
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"warning: checkpoint {folder / 'checkpoints' / '8'} is damaged")
    assert damaged.name in line


def test_damage_to_every_checkpoint_is_refused(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    damaged = [runs.flip_byte(path / "trainable") for path in (folder / "checkpoints").iterdir()]
    for program, words in ((train, runs.arguments(texts)), (sample, ["--prompt=x"])):
        capfd.readouterr()
        assert runs.call(program, f"--workdir={folder}", *words) == 2
        *warnings, line = capfd.readouterr().err.splitlines()
        assert line.startswith(f"error: {folder / 'checkpoints'} has no checkpoint that can be")
        assert all(path.name in line for path in damaged)
        # Each damaged checkpoint was told of as it was passed over.
        assert all(warning.startswith("warning: checkpoint ") for warning in warnings)
        assert len(warnings) == len(damaged)


def test_tensors_that_do_not_fit_are_refused(texts, tmp_path, capfd):
    theirs = huggingface.read_config(GOLDEN)
    names = ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "rope_theta")
    names += ("norm_eps", "tied_embeddings", "transform_size", "smoothing", "streams")
    shape = {f"model__{name}": getattr(theirs, name) for name in names}
    source = tmp_path / "source"
    shutil.copytree(GOLDEN, source)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors.pop("model.embed_tokens.weight")
    tensors |= {"surplus": np.zeros(1, np.float32), "model.norm.weight": embedding}
    save_file(tensors, source / "model.safetensors")
    line = refused(capfd, texts, tmp_path / "run", train__init_from=source, **shape)
    for message in (
        f"train.init_from={source}",
        "missing model.embed_tokens.weight",
        "unknown surplus",
        "wrongly shaped model.norm.weight [257, 64] (expected [64])",
    ):
        assert message in line
    assert not (tmp_path / "run").exists()
