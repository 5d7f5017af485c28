import subprocess
import sys

import jax
import numpy as np
import pytest
import runs

from experiments import train
from models import huggingface
from models.trees import select
from parscale import run as runner
from parscale import workdir
from parscale.checkpoints import restore_params, stored_shapes
from parscale.config import Config
from parscale.config_io import from_json, replace, to_json
from parscale.flops import parameter_counts

pytestmark = pytest.mark.usefixtures("compiler")

GOLDEN = "tests/data/parscale_p2"


def trained(texts, folder, *words, **changes):
    """Exit code of the training program on the tiny run."""
    return runs.call(train, *runs.arguments(texts, **changes), f"--workdir={folder}", *words)


def params(folder):
    """All weights of a run's last checkpoint."""
    return restore_params(folder / "checkpoints")[1]


def equal(first, second):
    """Whether two trees of arrays are the same to the bit."""
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, first, second))
    )


def refuse_to_start(texts, folder, capfd, *words, **changes):
    """The line with which training is refused."""
    return runs.refusal(
        capfd, train, *runs.arguments(texts, **changes), f"--workdir={folder}", *words
    )


def fail_before_training(monkeypatch):
    """Lets a run die as by `kill -9` between its start and its first step."""

    def die(*_):
        raise SystemExit(99)

    monkeypatch.setattr(runner.Loop, "run", die)
    monkeypatch.setattr(runner.Loop, "save", die)


def test_a_finished_run_leaves_its_workdir(two):
    config = from_json(Config, two / "config.json")
    figures = runs.result(two)
    counts = parameter_counts(config.model)
    assert figures["steps"] == config.train.steps == 8
    assert figures["streams"] == 2
    assert figures["parameters"] == counts["total"]
    assert figures["non_embedding_parameters"] == counts["non_embedding"]
    assert 0 < figures["tokens"] <= 8 * 8 * 32
    assert figures["bits_per_byte"] == pytest.approx(figures["held_out_loss"] / np.log(2))
    assert figures["perplexity"] == pytest.approx(np.exp(figures["held_out_loss"]))
    assert figures["ngram_bits_per_byte"].keys() == {"unigram", "bigram", "trigram"}
    assert all(len(figures[f"{name}_sha256"]) == 64 for name in ("weights", "examples", "corpus"))
    assert {"jax", "flax", "python"} <= figures["versions"].keys()
    assert figures["device"].startswith("8 x")
    assert runs.steps_saved(two) == [3, 6, 8]
    rows = runs.losses(two)
    assert [row[0] for row in rows] == [*range(1, 9), 8]
    assert rows[-1] == (8, None, pytest.approx(figures["held_out_loss"], rel=1e-8))
    assert rows[7][1] < rows[0][1]
    events = b"".join(path.read_bytes() for path in two.glob("events.out.tfevents.*"))
    assert all(name in events for name in (b"loss", b"grad_norm", b"bits_per_byte"))


def test_a_finished_run_is_not_trained_again(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert trained(texts, folder, train__checkpoint_every=3) == 0
    assert "all 8 steps were done before" in capfd.readouterr().err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_killed_before_its_result_was_written_is_not_recorded_twice(texts, two, tmp_path):
    folder = runs.copy(two, tmp_path / "run")
    (folder / "result.json").unlink()
    assert trained(texts, folder) == 0
    assert runs.losses(folder) == runs.losses(two)
    ours, theirs = runs.result(folder), runs.result(two)
    assert ours.pop("seconds") == pytest.approx(theirs.pop("seconds"), abs=0.01)
    assert ours == theirs


def test_more_steps_and_other_free_fields_go_on(texts, two, tmp_path):
    folder = tmp_path / "run"
    assert trained(texts, folder, train__steps=4) == 0
    figures = runs.result(folder)
    assert trained(texts, folder, train__keep=1, train__eval_rows=8) == 0
    assert runs.result(folder)["seconds"] > figures["seconds"]
    assert runs.hashes(folder) == runs.hashes(two)
    assert runs.steps_saved(folder) == [8]
    learned = [row for row in runs.losses(folder) if row[1] is not None]
    assert learned == [row for row in runs.losses(two) if row[1] is not None]
    assert from_json(Config, folder / "config.json").train.steps == 8


def test_fewer_steps_than_were_done_are_refused(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    line = refuse_to_start(texts, folder, capfd, train__steps=5)
    assert "train.steps=5" in line
    assert "8 steps" in line
    assert runs.result(folder)["steps"] == 8


def test_the_workdirs_own_configuration_goes_on(two, tmp_path):
    folder = runs.copy(two, tmp_path / "run")
    assert runs.call(train, f"--workdir={folder}", "--config.train.steps=9") == 0
    assert runs.result(folder)["steps"] == 9


def test_accumulation_and_another_mesh_do_not_change_the_losses(texts, two, tmp_path):
    parts = {"train__accumulate": 2, "mesh__data": 4, "mesh__stream": 2}
    assert trained(texts, tmp_path / "parts", **parts) == 0
    direct, parts = runs.losses(two), runs.losses(tmp_path / "parts")
    assert [row[0] for row in direct] == [row[0] for row in parts]
    for first, second in zip(direct, parts, strict=True):
        assert (first[1] or first[2]) == pytest.approx(second[1] or second[2], abs=1e-5)


def test_streams_grow_only_by_the_flag(texts, two, tmp_path, capfd, monkeypatch):
    folder = runs.copy(two, tmp_path / "run")
    grown = {"model__streams": 4, "train__steps": 10}
    line = refuse_to_start(texts, folder, capfd, **grown)
    assert "model.streams: 2 in the workdir, 4 now (--grow_streams would allow it)" in line
    with monkeypatch.context() as patch:
        fail_before_training(patch)
        assert trained(texts, folder, "--grow_streams", **grown) == 99
    # The configuration now says four, the checkpoints still have two.
    assert trained(texts, folder, **grown) == 0
    figures = runs.result(folder)
    assert (figures["streams"], figures["steps"]) == (4, 10)
    before, after = (params(run)["layers"]["mixer"]["streams"]["k"] for run in (two, folder))
    assert after.shape == (before.shape[0], 4, *before.shape[2:])
    # A step of AdamW moves a weight by about the learning rate, here 0.01.
    assert np.abs(after[:, :2] - before).max() < 0.03
    assert np.abs(after[:, 2:]).max() > 0

    finished = runs.hashes(folder)
    runs.flip_byte(folder / "checkpoints" / "10")  # back to two streams, of step 8
    capfd.readouterr()
    assert trained(texts, folder, **grown) == 0
    assert capfd.readouterr().err.count("damaged and passed over") == 1
    assert runs.hashes(folder) == finished

    line = refuse_to_start(texts, folder, capfd, model__streams=2, train__steps=12)
    assert "model.streams: 4 in the workdir, 2 now (it can only grow)" in line


def test_given_weights_are_not_forgotten_by_an_early_death(texts, one, tmp_path, monkeypatch):
    given = {"train__init_from": one}
    with monkeypatch.context() as patch:
        fail_before_training(patch)
        assert trained(texts, tmp_path / "killed", **given) == 99
    assert (tmp_path / "killed" / "checkpoints").is_dir()
    assert trained(texts, tmp_path / "killed", **given) == 0
    first = runs.losses(tmp_path / "killed")[0][1]
    ends = runs.losses(one)
    assert abs(first - ends[7][1]) < 0.4 < abs(first - ends[0][1])


def test_second_stage_learns_streams_alone(texts, one, family):
    backbone = params(one)
    assert equal(restore_params(family / "backbone")[1], backbone)
    assert len(list(family.rglob("backbone"))) == 1
    for streams in (2, 4):
        weights = workdir.load_weights(family, streams)
        assert weights.model.streams == streams
        assert equal(select(weights.params, backbone), backbone)
        folder = family / "streams" / str(streams)
        learned = params(folder)
        assert learned["layers"]["mixer"].keys() == {"streams"}
        assert learned["layers"].keys() == {"mixer"}
        assert learned.keys() == {"layers", "aggregation"}
        optimizer = stored_shapes(folder / "checkpoints")["optimizer"]
        arrays = [leaf for leaf in jax.tree.leaves(optimizer) if leaf.shape]
        assert len(arrays) == 2 * len(jax.tree.leaves(learned))  # both moments, of these alone
        _, earlier, _ = restore_params(folder / "checkpoints", step=3)
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), earlier, learned)
        assert all(jax.tree.leaves(moved))


def test_streams_run_resumes_exactly(texts, one, family, tmp_path):
    second = {"model__streams": 2, "train__init_from": one, "train__trainable": "streams"}
    folder = tmp_path / "run"
    assert trained(texts, folder, train__steps=4, **second) == 0
    assert trained(texts, folder, **second) == 0
    assert runs.hashes(folder / "streams" / "2") == runs.hashes(family / "streams" / "2")


def test_another_backbone_is_refused(texts, one, family, tmp_path, capfd):
    folder = runs.copy(family, tmp_path / "run")
    other = runs.copy(one, tmp_path / "other")
    assert trained(texts, other, model__streams=1, train__steps=9) == 0
    second = {"model__streams": 3, "train__trainable": "streams"}
    line = refuse_to_start(texts, folder, capfd, train__init_from=other, **second)
    assert "keeps streams of another backbone" in line
    assert str(folder) in line
    line = refuse_to_start(texts, folder, capfd, **second)
    assert "train.trainable=streams: give the backbone with --config.train.init_from=" in line


def test_a_number_of_streams_stays_unique_in_a_workdir(texts, one, two, family, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    second = {"train__init_from": one, "train__trainable": "streams"}
    line = refuse_to_start(texts, folder, capfd, **second)
    assert f"{folder} already holds a run with 2 streams" in line
    line = refuse_to_start(texts, family, capfd)
    assert f"{family / 'streams' / '2'} already holds a run with 2 streams" in line


def test_second_stage_from_a_hugging_face_directory(texts, tmp_path, capfd):
    theirs = huggingface.read_config(GOLDEN)
    names = ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "rope_theta")
    names += ("norm_eps", "tied_embeddings", "transform_size", "smoothing", "streams")
    shape = {f"model__{name}": getattr(theirs, name) for name in names}
    shape |= {"train__init_from": GOLDEN, "train__trainable": "streams", "train__steps": 2}
    assert trained(texts, tmp_path / "run", **shape) == 0
    given = huggingface.load_params(GOLDEN, theirs)
    backbone = restore_params(tmp_path / "run" / "backbone")[1]
    assert equal(backbone, select(given, backbone))
    before = given["layers"]["mixer"]["streams"]["k"]
    learned = params(tmp_path / "run" / "streams" / "2")["layers"]["mixer"]["streams"]["k"]
    assert 0 < np.abs(learned - before).max() < 0.05  # two steps from the given streams
    line = refuse_to_start(texts, tmp_path / "run", capfd, **shape | {"model__width": 32})
    assert "width" in line


def test_a_tokenizer_that_the_given_weights_do_not_speak_is_refused(texts, two, tmp_path, capfd):
    pytest.importorskip("tokenizers")
    from parscale.tokenizers import train_bpe

    base, tokenizer = runs.copy(two, tmp_path / "base"), tmp_path / "tokenizer.json"
    train_bpe([path.read_text() for path in texts.iterdir()], 256).save(tokenizer)
    config = from_json(Config, base / "config.json")
    to_json(replace(config, {"data.tokenizer": str(tokenizer)}), base / "config.json")
    line = refuse_to_start(texts, tmp_path / "run", capfd, train__init_from=base)
    assert f"--config.data.tokenizer={tokenizer}" in line


def test_divergence_stops_the_run_and_keeps_a_good_checkpoint(texts, tmp_path, capfd):
    folder = tmp_path / "run"
    wild = {"train__learning_rate": 1e30, "train__max_bad_steps": 3, "train__steps": 30}
    wild |= {"train__checkpoint_every": 1}
    assert trained(texts, folder, **wild) == 1
    error = capfd.readouterr().err.splitlines()
    assert "Traceback" not in "".join(error)
    assert error[-1].startswith("error: 3 steps in a row up to step")
    assert "train.learning_rate" in error[-1]
    assert sum("skipped" in line for line in error) == 3
    assert not (folder / "result.json").exists()
    kept = params(folder)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))


def test_profile_is_written(texts, tmp_path):
    assert trained(texts, tmp_path / "run", "--profile_steps=2,3", train__steps=4) == 0
    assert any(path.stat().st_size for path in (tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_samples_are_printed_at_the_end(texts, two, tmp_path, capfd):
    folder = runs.copy(two, tmp_path / "run")
    assert trained(texts, folder, train__steps=9, train__sample_tokens=4) == 0
    out = capfd.readouterr().out
    assert out.count("--- sample") == 3
    assert "--- sample\ndef " in out


def test_a_folder_that_cannot_be_a_workdir_is_refused(texts, tmp_path, capfd):
    (tmp_path / "file").write_text("here")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        line = refuse_to_start(texts, folder, capfd)
        assert f"{tmp_path / 'file'} is a file" in line


def test_help_of_every_program_is_quick_and_does_not_load_jax():
    names = ("train", "sample", "evaluate", "convert", "prepare_data")
    code = (
        "import sys\n"
        "for name in sys.argv[1:]:\n"
        "    module = __import__(f'experiments.{name}', fromlist=['main'])\n"
        "    from experiments import program\n"
        "    try:\n"
        "        program.run(module.main, module.FLAGS, [name, '--help'])\n"
        "    except SystemExit as exit_:\n"
        "        print('exit code', exit_.code)\n"
        "print('loaded', *sorted({'jax', 'flax', 'orbax', 'grain'} & sys.modules.keys()))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("exit code 0\n") == len(names)
    assert done.stdout.endswith("loaded\n")
    assert done.stdout.count("--help") >= len(names)
