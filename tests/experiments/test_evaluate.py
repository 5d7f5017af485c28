import json

import jax
import numpy as np
import pytest
import runs

from experiments import convert, evaluate
from parscale import data, workdir

pytestmark = pytest.mark.usefixtures("compiler")


def evaluated(capfd, folder, tmp_path, *words):
    """What the program prints, and the figures it writes."""
    capfd.readouterr()
    words = [f"--workdir={folder}", f"--json={tmp_path / 'figures'}", *words]
    assert runs.call(evaluate, *words) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return out, json.loads((tmp_path / "figures").read_text())


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_figures_are_those_of_the_run(two, tmp_path, capfd):
    rows = runs.TRAIN["eval_rows"]
    out, figures = evaluated(capfd, two, tmp_path, f"--rows={rows}", f"--batch={rows}")
    result = runs.result(two)
    # Another division over devices: float32 sums in another order.
    assert figures["loss"] == pytest.approx(result["held_out_loss"], abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(result["bits_per_byte"], abs=1e-5)
    assert f"perplexity      {result['perplexity']:.3f}"[:-1] in out
    assert ("WARNING: the 2 streams have collapsed" in out) == figures["collapsed"]


def test_a_mesh_gives_the_same_figures(two, tmp_path, capfd):
    _, one = evaluated(capfd, two, tmp_path, "--rows=16")
    mesh = ("--config.mesh.data=4", "--config.mesh.stream=2")
    _, figures = evaluated(capfd, two, tmp_path, "--rows=16", *mesh)
    assert figures.keys() == one.keys()
    for name, figure in figures.items():
        # Float32 sums in another order.
        np.testing.assert_allclose(figure, one[name], atol=1e-5, err_msg=name)


def test_what_the_streams_do_agrees_with_numpy(two, texts, tmp_path, capfd):
    file = texts / "03.txt"
    _, figures = evaluated(capfd, two, tmp_path, f"--files={file}", "--rows=0", "--batch=8")
    weights = workdir.load_weights(two)
    model = weights.build()
    text = data.open_files(str(file), weights.data, 256)
    batch = text.held_out.take(np.arange(len(text.held_out)))
    names = ("ids", "positions", "segment_ids")

    @jax.jit
    def run(ids, positions, segment_ids):
        x, _ = model.run_streams(ids, positions=positions, segment_ids=segment_ids)
        return x, model.aggregation.weights(x)

    x, mix = run(*(batch[name] for name in names))
    mix = np.asarray(mix, np.float64)
    counted = batch["mask"] > 0
    x = np.moveaxis(np.asarray(x, np.float64), 1, 2)[counted]  # tokens, P, D
    mix, targets = mix[counted], batch["targets"][counted]
    head = np.asarray(model.head_weight(), np.float64)
    alone = log_softmax(x @ head)
    losses = -np.take_along_axis(alone, targets[:, None, None], 2)[..., 0].mean(0)
    mixed = log_softmax(np.einsum("np,npd->nd", mix, x) @ head)
    loss = -np.take_along_axis(mixed, targets[:, None], 1).mean()
    guesses = alone.argmax(-1)
    assert figures["tokens"] == counted.sum() == len(file.read_bytes()) - 1
    assert figures["loss"] == pytest.approx(loss, abs=1e-5)
    assert figures["bits_per_byte"] == pytest.approx(loss / np.log(2), abs=1e-5)
    np.testing.assert_allclose(figures["stream_losses"], losses, atol=1e-5)
    np.testing.assert_allclose(figures["weights"], mix.mean(0), atol=1e-5)
    entropy = -(mix * np.log(mix)).sum(-1).mean()
    assert figures["weight_entropy"] == pytest.approx(entropy, abs=1e-5)
    agreement = (guesses[:, :, None] == guesses[:, None]).mean(0)
    # Float32 may decide a near tie otherwise, for one token.
    np.testing.assert_allclose(figures["agreement"], agreement, atol=1.5 / len(guesses))
    assert figures["gain"] == pytest.approx(losses.min() - loss, abs=2e-5)


def test_the_plain_model_has_no_streams_to_tell_of(one, tmp_path, capfd):
    out, figures = evaluated(capfd, one, tmp_path, "--rows=16")
    assert "stream" not in out
    assert figures["gain"] == 0
    assert not figures["collapsed"]


def test_equal_streams_have_collapsed(one, tmp_path, capfd):
    # A plain model grown: prefixes of almost nothing make almost no difference.
    target = tmp_path / "grown"
    assert runs.call(convert, f"--source={one}", f"--target={target}", "--streams=2") == 0
    out, figures = evaluated(capfd, target, tmp_path, "--rows=16")
    assert figures["collapsed"]
    assert "WARNING: the 2 streams have collapsed into one" in out


def test_a_shared_prompt_has_its_loss(two, tmp_path, capfd):
    out, figures = evaluated(capfd, two, tmp_path, "--rows=32", "--shared_prompt=20")
    losses = figures["shared_prompt"]
    assert f"read by one stream   {losses['shared']:.4f}" in out
    assert losses["tokens"] > 0
    assert losses["exact"] == pytest.approx(losses["shared"], abs=0.1)


def test_streams_are_chosen_by_number(family, tmp_path, capfd):
    _, figures = evaluated(capfd, family, tmp_path, "--rows=16", "--streams=4")
    result = runs.result(family / "streams" / "4")
    assert figures["loss"] == pytest.approx(result["held_out_loss"], abs=1e-5)
    line = runs.refusal(capfd, evaluate, f"--workdir={family}")
    assert "(2, 4): choose one with --streams" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdir="], "--workdir is missing"),
        (["--batch=0"], "--batch=0 --rows=512: expected at least 1"),
        (["--rows=-1"], "--rows=-1: expected"),
        (["--files={tmp}/none"], "{tmp}/none: no file is there"),
        (["--files={tmp}/empty"], "{tmp}/empty: the file is empty"),
        (["--files={tmp}/latin"], "{tmp}/latin: not UTF-8 at byte 3"),
        (["--files={tmp}/byte"], "{tmp}/byte: 1 tokens are too few to predict one"),
        (["--files={tmp}/byte*"], "{tmp}/byte*: no document has two tokens"),
        (["--json={tmp}"], "--json={tmp}: Is a directory"),
        (["--batch=6", "--config.mesh.data=8"], "a batch: axis 'batch' of size 6 does not divide"),
        (["--shared_prompt=999"], "shared_prompt=999: expected 1 to"),
        (["--streams=3"], "--streams=3: {two} has no run with 3 streams"),
    ],
)
def test_bad_input(words, message, two, tmp_path, capfd):
    for name, content in (("empty", b""), ("latin", b"caf\xe9"), ("byte", b"a"), ("byte2", b"b")):
        (tmp_path / name).write_bytes(content)
    places = {"tmp": tmp_path, "two": two}
    words = [word.format(**places) for word in words]
    line = runs.refusal(capfd, evaluate, f"--workdir={two}", *words)
    assert message.format(**places) in line
