import json
import shutil

import jax
import numpy as np
import pytest
import runs
from safetensors.numpy import load_file, save_file

from experiments import convert, sample
from parscale import workdir
from parscale.checkpoints import SaveError

pytestmark = pytest.mark.usefixtures("compiler")

GOLDEN = "tests/data/parscale_p2"


def converted(source, target, *words):
    """The target, converted."""
    assert runs.call(convert, f"--source={source}", f"--target={target}", *words) == 0
    return target


def same(first, second):
    """Whether two trees of arrays are equal to the bit."""
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, first, second))
    )


def refused(capfd, source, target, *words):
    return runs.refusal(capfd, convert, f"--source={source}", f"--target={target}", *words)


def test_a_run_goes_to_hugging_face_and_back(two, tmp_path):
    theirs = converted(two, tmp_path / "theirs", "--to=huggingface")
    settings = json.loads((theirs / "config.json").read_text())
    assert settings["architectures"] == ["Qwen2ParScaleForCausalLM"]
    assert settings["parscale_n"] == 2
    ours = converted(theirs, tmp_path / "ours")
    assert same(workdir.load_weights(ours).params, workdir.load_weights(two).params)


def test_a_hugging_face_directory_survives_the_way_there_and_back(tmp_path, capfd):
    ours = converted(GOLDEN, tmp_path / "ours")
    assert capfd.readouterr().out == f"{ours}: workdir with 2 streams\n"
    theirs = converted(ours, tmp_path / "theirs", "--to=huggingface")
    before, after = (load_file(f"{path}/model.safetensors") for path in (GOLDEN, theirs))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert all(before[name].dtype == after[name].dtype for name in before)


def test_the_tokenizer_of_a_run_is_exported(two, texts, tmp_path):
    pytest.importorskip("tokenizers")
    from parscale.tokenizers import load, train_bpe

    bpe = train_bpe([path.read_text() for path in texts.iterdir()], 256)
    bpe.save(tmp_path / "bpe.json")
    source = runs.copy(two, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["data"]["tokenizer"] = str(tmp_path / "bpe.json")
    (source / "config.json").write_text(json.dumps(config))
    theirs = converted(source, tmp_path / "theirs", "--to=huggingface")
    assert load(str(theirs)).fingerprint == bpe.fingerprint
    (tmp_path / "bpe.json").unlink()
    assert workdir.load_weights(theirs).data.tokenizer == str(theirs / "tokenizer.json")


def test_a_plain_model_grows_and_is_sampled(one, tmp_path, capfd):
    target = converted(one, tmp_path / "four", "--streams=4")
    capfd.readouterr()
    grown, plain = workdir.load_weights(target), workdir.load_weights(one)
    assert grown.model.streams == 4
    assert same(workdir.backbone_of(grown.params, grown.model), plain.params)
    assert runs.call(sample, f"--workdir={target}", "--prompt=def", "--tokens=1") == 0
    again = converted(one, tmp_path / "again", "--streams=4")
    other = converted(one, tmp_path / "other", "--streams=4", "--seed=1")
    assert same(grown.params, workdir.load_weights(again).params)
    assert not same(grown.params, workdir.load_weights(other).params)


def test_a_number_that_a_workdir_keeps_is_taken_and_another_grown(family, tmp_path, capfd):
    target = converted(family, tmp_path / "two", "--streams=2")
    expected = workdir.load_weights(family, 2).params
    assert same(workdir.load_weights(target).params, expected)
    # Where several are kept, none of them is the one to grow.
    assert "only with 2, 4" in refused(capfd, family, tmp_path / "no", "--streams=8")
    assert "choose one with --streams" in refused(capfd, family, tmp_path / "no")
    grown = workdir.load_weights(converted(target, tmp_path / "three", "--streams=3"))
    assert grown.model.streams == 3
    kept = expected["layers"]["mixer"]["streams"]["k"]
    assert np.array_equal(grown.params["layers"]["mixer"]["streams"]["k"][:, :2], kept)


def test_a_full_device_is_one_line(two, tmp_path, monkeypatch, capfd):
    def fail(*_, **__):
        raise error

    for error in (OSError(28, "No space left on device"), SaveError("no space")):
        monkeypatch.setattr("parscale.conversion.convert", fail)
        assert runs.call(convert, f"--source={two}", f"--target={tmp_path / 'x'}") == 1
        assert capfd.readouterr().err == f"error: {error}\n"


def test_what_is_in_the_way_is_refused(two, tmp_path, capfd):
    (tmp_path / "file").write_text("here")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("here")
    for name in ("file", "full"):
        assert str(tmp_path / name) in refused(capfd, two, tmp_path / name)
    assert f"{two} is in the way" in refused(capfd, two, two)
    assert f"{tmp_path / 'file'} is a file" in refused(capfd, two, tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source="], "--source is missing"),
        (["--target="], "--target is missing"),
        (["--source={tmp}/none"], "{tmp}/none: no such folder"),
        (["--source={tmp}"], "{tmp}: no run there"),
        (["--streams=0"], "--streams=0: expected at least 1"),
        (["--streams=1"], "streams=1: the weights have 2 streams, which can only grow"),
        (["--seed=-1"], "--seed=-1"),
        (["--to=pickle"], "--to=pickle"),
    ],
)
def test_bad_input(words, message, two, tmp_path, capfd):
    words = [word.format(tmp=tmp_path) for word in words]
    line = refused(capfd, two, tmp_path / "target", *words)
    assert message.format(tmp=tmp_path) in line
    assert not (tmp_path / "target").exists()


def test_a_transform_that_hugging_face_cannot_hold_is_refused(one, tmp_path, capfd):
    source = runs.copy(one, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["model"]["transform"] = "bias"
    (source / "config.json").write_text(json.dumps(config))
    words = ("--streams=2", "--to=huggingface")
    line = refused(capfd, source, tmp_path / "target", *words)
    assert "transform=bias" in line
    assert "transform=prefix" in line
    assert not (tmp_path / "target").exists()


def spoil(folder, change):
    """Writes the golden model's directory with its tensors changed."""
    folder.mkdir()
    tensors = load_file(f"{GOLDEN}/model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    shutil.copy(f"{GOLDEN}/config.json", folder)
    return folder


def test_tensors_that_do_not_fit_are_named(tmp_path, capfd):
    norm = "model.norm.weight"
    cases = {
        "missing": (lambda tensors: tensors.pop(norm), f"missing {norm}"),
        "extra": (
            lambda tensors: tensors.update(other=np.zeros(3, np.float32)),
            "unknown other",
        ),
        "shape": (
            lambda tensors: tensors.update({norm: np.zeros(3, np.float32)}),
            f"wrongly shaped {norm} [3] (expected [64])",
        ),
    }
    for name, (change, message) in cases.items():
        source = spoil(tmp_path / name, change)
        line = refused(capfd, source, tmp_path / "target")
        assert str(source) in line
        assert message in line
    (source / "model.safetensors").write_bytes(b"\0" * 100)
    assert "model.safetensors is not a whole safetensors file" in refused(
        capfd, source, tmp_path / "target"
    )
    (source / "model.safetensors").rename(source / "pytorch_model.bin")
    assert "is a pickle, which is never read" in refused(capfd, source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
