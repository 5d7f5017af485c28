import io
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from experiments import sample
from parscale import workdir

pytestmark = pytest.mark.usefixtures("compiler")

TOKENS = 17  # the first, and twice eight


class Recorder(io.StringIO):
    """A standard output that remembers what a reader had seen at each flush."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def flush(self):
        self.seen.append(self.getvalue())


def sampled(capfd, folder, *words):
    """What the program prints."""
    capfd.readouterr()
    assert runs.call(sample, f"--workdir={folder}", f"--tokens={TOKENS}", *words) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return out


def argmax_text(folder, prompt, tokens, streams=None):
    """Greedy text from whole forward passes without a cache."""
    model = workdir.load_weights(folder, streams).build()
    forward = jax.jit(lambda ids: model(ids))
    ids = list(prompt.encode())
    length = len(ids) + tokens  # what follows a position does not change its logits
    for _ in range(tokens):
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(padded)[0, len(ids) - 1])))
    return bytes(ids).decode(errors="replace")


def test_greedy_text_is_that_of_uncached_forward_passes(two, capfd):
    out = sampled(capfd, two, "--prompt=def f", "--temperature=0")
    assert out == argmax_text(two, "def f", TOKENS) + "\n"


def test_a_mesh_writes_the_same_text(two, capfd):
    words = ("--prompt=def f", "--prompt=x", "--prompt=return", "--temperature=0")
    mesh = ("--config.mesh.data=4", "--config.mesh.stream=2")
    assert sampled(capfd, two, *words, *mesh) == sampled(capfd, two, *words)


def test_text_appears_as_it_is_generated(two, monkeypatch):
    out = Recorder()
    monkeypatch.setattr(sys, "stdout", out)
    words = ("--prompt=def f", "--temperature=0", f"--tokens={TOKENS}")
    assert runs.call(sample, f"--workdir={two}", *words) == 0
    lengths = sorted({len(text) for text in out.seen})
    assert lengths[0] == len("def f")  # the prompt stands there before the first token is known
    assert len(lengths) >= 3
    assert max(np.diff(lengths)) <= 9


def test_seed_decides(two, capfd):
    words = ("--prompt=def f", "--temperature=1.5")
    first, again, other = (sampled(capfd, two, *words, f"--seed={seed}") for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_several_prompts_also_from_a_file(two, tmp_path, capfd):
    (tmp_path / "prompts").write_text("x +\nreturn\x0c\n")
    words = ("--prompt=def f", f"--prompt_file={tmp_path / 'prompts'}", "--temperature=0")
    out = sampled(capfd, two, *words)
    expected = [argmax_text(two, prompt, TOKENS) for prompt in ("def f", "x +", "return\x0c")]
    assert out == "".join(f"--- {number}\n{text}\n" for number, text in enumerate(expected))


def test_stop(two, capfd):
    whole = argmax_text(two, "def f", TOKENS)
    new = whole.removeprefix("def f")
    stop = new[4:6]
    out = sampled(capfd, two, "--prompt=def f", "--temperature=0", f"--stop={stop}", "--stop=none")
    assert out == "def f" + new[: new.index(stop)] + "\n"


def test_layouts_write_several_branches(two, capfd):
    words = ("--prompt=def f", "--temperature=0")
    plain = sampled(capfd, two, *words)
    assert sampled(capfd, two, *words, "--layout=shared_prompt") != ""
    # One worker alone reads what a plain text has.
    alone = '--layout={"name": "hogwild", "workers": [" "]}'
    runs.call(sample, f"--workdir={two}", f"--tokens={TOKENS}", *words, alone)
    out, error = capfd.readouterr()
    new = argmax_text(two, "def f ", TOKENS).removeprefix("def f ")
    assert out == f"--- 0\ndef f {new}\n"
    assert error == "17 tokens generated, 17 of them one after the other\n"
    both = '--layout={"name": "parathinker", "thoughts": ["a", "b"], "most": 5}'
    runs.call(sample, f"--workdir={two}", f"--tokens={TOKENS}", *words, both)
    assert "27 tokens generated, 22 of them" in capfd.readouterr().err
    assert plain == argmax_text(two, "def f", TOKENS) + "\n"


def test_streams_are_chosen_by_number(family, capfd):
    texts = {}
    for streams in (2, 4):
        out = sampled(capfd, family, "--prompt=def f", "--temperature=0", f"--streams={streams}")
        assert out == argmax_text(family, "def f", TOKENS, streams) + "\n"
        texts[streams] = out
    line = runs.refusal(capfd, sample, f"--workdir={family}", "--prompt=x")
    assert f"{family} keeps several numbers of streams (2, 4): choose one with --streams" in line
    line = runs.refusal(capfd, sample, f"--workdir={family}", "--prompt=x", "--streams=3")
    assert f"--streams=3: {family} has no run with 3 streams, only with 2, 4" in line


def test_from_a_hugging_face_directory(capfd):
    words = ("--prompt=abc", "--temperature=0", "--tokens=1")
    out = sampled(capfd, "tests/data/parscale_p2", *words)
    assert out == argmax_text("tests/data/parscale_p2", "abc", 1) + "\n"


def test_a_reader_may_leave(two, monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    words = ("--prompt=def f", "--temperature=0", f"--tokens={TOKENS}")
    with os.fdopen(writing, "w") as out, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        assert runs.call(sample, f"--workdir={two}", *words) == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no prompt: give --prompt=TEXT or --prompt_file=FILE"),
        (["--prompt="], "prompt 0 is empty"),
        (["--prompt=\udcff"], "--prompt='\\udcff' is not UTF-8"),
        (["--prompt_file={tmp}/none"], "--prompt_file={tmp}/none: No such file or directory"),
        (["--prompt_file={tmp}/latin"], "--prompt_file={tmp}/latin is not UTF-8 (byte 3)"),
        (["--prompt=x", "--tokens=0"], "tokens=0: expected at least 1"),
        (["--prompt=x", "--tokens=5000"], "model's max_length=2048"),
        (["--prompt=x", "--tokens=x"], "--tokens=x: expected an integer"),
        (["--prompt=x", "--temperature=-1"], "temperature=-1.0: expected 0 (greedy) or more"),
        (["--prompt=x", "--top_k=-1"], "top_k=-1: expected 0 (all tokens) to 2**31 - 1"),
        (["--prompt=x", "--top_p=0"], "top_p=0.0: expected more than 0"),
        (["--prompt=x", "--seed=-1"], "--seed=-1"),
        (["--prompt=x", "--streams=4"], "--streams=4: {two} has no run with 4 streams, only"),
        (["--prompt=x", "--layout=hogwld"], "layout 'hogwld': expected one of plain, shared_promp"),
        (["--prompt=x", "--layout={{"], "the layout '{{' is no JSON"),
        (["--prompt=x", "--layout=ape"], "layout ape: its field shared is missing"),
        (["--prompt=x", "--cache_tokens=9"], "request 0 needs"),
        (["--prompt=x", "--config.mesh.stream=3"], "stream=3: the fixed axes take 3 devices"),
        (["--prompt=x", "--config.mesh.sequence=2"], "config.mesh.sequence=2: text is written"),
        (["--prompt=x", "--workdir="], "--workdir is missing"),
        (["--prompt=x", "--workdir={tmp}/none"], "{tmp}/none: no such folder"),
        (["--prompt=x", "--workdir={tmp}"], "{tmp}: no run there"),
    ],
)
def test_bad_input(words, message, two, tmp_path, capfd):
    (tmp_path / "latin").write_bytes(b"caf\xe9\n")
    places = {"tmp": tmp_path, "two": two}
    words = [word.format(**places) for word in words]
    line = runs.refusal(capfd, sample, f"--workdir={two}", *words)
    assert message.format(**places) in line
