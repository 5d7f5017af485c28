"""Real processes train one run, are told to stop, disagree, and are lost."""

import signal

import jax
import numpy as np
import processes
import pytest
from processes import Processes

from experiments import program
from parscale import config_io, run
from parscale.checkpoints import restore_params

pytestmark = pytest.mark.multiprocess

STEPS = 20_000
"""More than any test waits for."""


def train_here(texts, folder, devices, **changes):
    """The same run in this process; returns its result."""
    fields = processes.FIELDS | {"data.corpus": str(texts)}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    config = config_io.replace(program.load_preset("tiny"), fields)
    return run.train(config, folder, devices=jax.devices()[:devices])


def difference(one, other):
    """Relative RMS of the difference of two trees of arrays.

    Sums over devices are added in another order by other means of transport, so bits may differ;
    and AdamW divides a gradient by its own size, so where gradients are tiny they differ most.
    """
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return np.sqrt(
        sum(np.sum((a - b) ** 2) for a, b in pairs) / sum(np.sum(b**2) for _, b in pairs)
    )


def test_two_processes_stop_go_on_and_equal_one(texts, cache, tmp_path, little_optimization):
    folder, here = tmp_path / "run", tmp_path / "here"
    words = processes.arguments(texts, folder, train__steps=STEPS)
    with Processes(2, words, tmp_path / "logs", cache) as two:
        two.wait_until(lambda: processes.steps_done(folder) >= 2)
        two.all[1].send_signal(signal.SIGTERM)
        assert two.wait() == [143, 143], two.told()
        assert "interrupted and saved" in two.text(0)
        assert "loss" not in two.text(1)
    (saved,) = processes.steps_saved(folder)
    assert [row[0] for row in processes.losses(folder)] == list(range(1, saved + 1))

    steps = saved + 2
    words = processes.arguments(texts, folder, train__steps=steps)
    processes.train(2, words, tmp_path / "logs", cache)
    train_here(texts, here, 4, train__steps=steps)
    ours, theirs = processes.losses(folder), processes.losses(here)
    assert [row[:2] for row in ours] == [row[:2] for row in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        values = [(a, b) for a, b in zip(mine[2:], other[2:], strict=True) if b is not None]
        np.testing.assert_allclose(*zip(*values, strict=True), rtol=1e-5)
    weights = [restore_params(path / "checkpoints")[1] for path in (folder, here)]
    # A step of AdamW adds about 1e-7; how many there are depends on when the signal came.
    assert difference(*weights) < 1e-6 + 2e-7 * steps
    ours, theirs = processes.result(folder), processes.result(here)
    for name in ("examples_sha256", "tokens", "ngram_bits_per_byte", "corpus_sha256"):
        assert ours[name] == theirs[name]
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-6)


def test_hosts_that_disagree_say_about_what(texts, cache, tmp_path):
    own = {1: ["--config.train.learning_rate=0.02"]}
    words = processes.arguments(texts, tmp_path / "run")
    with Processes(2, words, tmp_path / "logs", cache, own=own) as two:
        assert two.wait() == [2, 2], two.told()
        for process in range(2):
            (error,) = two.errors(process)
            assert "--config.train.learning_rate is 0.01 on process 0, but 0.02 on" in error
            assert "Traceback" not in two.text(process)
    assert not (tmp_path / "run" / "config.json").exists()
