"""Weights from Hugging Face to a workdir and back, with more streams where asked."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import huggingface
from parscale import config_io, workdir
from parscale.config import Config
from parscale.conversion import convert
from parscale.tokenizers import train_bpe
from sharding.settings import InputError

GOLDEN = Path(__file__).parent.parent / "data" / "parscale_p2"


@pytest.fixture(scope="module")
def golden_workdir(tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "work"
    convert(GOLDEN, target, to="workdir")
    return target


def assert_same_tensors(first: Path, second: Path, names=None) -> None:
    old, new = load_file(first / huggingface.WEIGHTS), load_file(second / huggingface.WEIGHTS)
    if names is None:
        assert old.keys() == new.keys()
    for name in names or old:
        assert new[name].dtype == old[name].dtype, name
        assert new[name].tobytes() == old[name].tobytes(), name


def plain_directory(directory: Path) -> Path:
    """The golden model without its streams."""
    directory.mkdir()
    config = json.loads((GOLDEN / "config.json").read_text())
    config |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
    config = {name: value for name, value in config.items() if not name.startswith("parscale")}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = load_file(GOLDEN / huggingface.WEIGHTS)
    save_file(
        {n: a for n, a in tensors.items() if "prefix" not in n and "aggregate" not in n},
        directory / huggingface.WEIGHTS,
    )
    return directory


def test_there_and_back_changes_no_tensor(golden_workdir, tmp_path):
    model = convert(golden_workdir, tmp_path / "back", to="huggingface")
    assert model == huggingface.read_config(GOLDEN)
    assert_same_tensors(GOLDEN, tmp_path / "back")
    theirs = json.loads((GOLDEN / "config.json").read_text())
    assert theirs.items() <= json.loads((tmp_path / "back" / "config.json").read_text()).items()


def test_a_converted_workdir_reads_as_any_other(golden_workdir):
    config = config_io.from_json(Config, golden_workdir / workdir.CONFIG)
    assert config.model == huggingface.read_config(GOLDEN)
    weights = workdir.load_weights(golden_workdir)
    assert (weights.model, weights.step) == (config.model, 0)
    expected = huggingface.load_params(GOLDEN, config.model)
    assert weights.params["embedding"].tobytes() == expected["embedding"].tobytes()


def test_streams_grow_from_one_and_from_two(golden_workdir, tmp_path):
    plain = plain_directory(tmp_path / "plain")
    model = convert(plain, tmp_path / "four", to="huggingface", streams=4)
    assert model.streams == 4
    assert_same_tensors(plain, tmp_path / "four", load_file(plain / huggingface.WEIGHTS))
    assert huggingface.read_config(tmp_path / "four").streams == 4
    grown = convert(golden_workdir, tmp_path / "grown", to="workdir", streams=4)
    assert grown == dataclasses.replace(huggingface.read_config(GOLDEN), streams=4)
    old = workdir.load_weights(golden_workdir).params["layers"]["mixer"]["streams"]["k"]
    new = workdir.load_weights(tmp_path / "grown").params["layers"]["mixer"]["streams"]["k"]
    assert new.shape[1] == 4
    assert np.asarray(new[:, :2]).tobytes() == np.asarray(old).tobytes()
    with pytest.raises(InputError, match="only grow"):
        convert(golden_workdir, tmp_path / "fewer", to="workdir", streams=1)
    assert not (tmp_path / "fewer").exists()


def test_the_tokenizer_goes_along(tmp_path):
    source = plain_directory(tmp_path / "source")
    tokenizer = train_bpe(["a text to learn from, " * 20], 257)
    tokenizer.save(source / "tokenizer.json")
    convert(source, tmp_path / "work", to="workdir")
    shutil.rmtree(source)
    spec = workdir.load_weights(tmp_path / "work").data.tokenizer
    assert Path(spec).read_text() == tokenizer.json
    convert(tmp_path / "work", tmp_path / "back", to="huggingface")
    assert (tmp_path / "back" / "tokenizer.json").read_text() == tokenizer.json


def test_a_target_in_the_way_is_refused(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    for target, word in ((full, "is in the way"), (tmp_path / "file", "is a file")):
        with pytest.raises(InputError, match=f"{target} {word}"):
            convert(GOLDEN, target, to="workdir")
    assert (full / "thesis.txt").read_text() == "precious"
    (tmp_path / "empty").mkdir()
    convert(GOLDEN, tmp_path / "empty", to="huggingface")
    assert_same_tensors(GOLDEN, tmp_path / "empty")


def test_a_source_that_is_nothing_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for source, word in (("nowhere", "no such folder"), ("empty", "no run there")):
        with pytest.raises(InputError, match=word):
            convert(tmp_path / source, tmp_path / "target", to="workdir")
        assert not (tmp_path / "target").exists()
