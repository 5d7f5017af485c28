"""A run is killed, interrupted, damaged and starved from outside, and ends as if nothing was."""

import itertools
import os
import random
import resource
import signal
import time

import pytest
import runs

from experiments import train

pytestmark = pytest.mark.usefixtures("compiler")

STEPS = 32
PATIENCE = 120  # seconds; a machine may be busy


def begin(texts, folder, cache, steps, every=4):
    """The training program in a process of its own, saving often."""
    words = runs.arguments(texts, train__steps=steps, train__checkpoint_every=every)
    return runs.start("train", *words, f"--workdir={folder}", cache=cache)


def go_on(texts, folder, steps, every=4):
    """The same in this process; returns its exit code."""
    words = runs.arguments(texts, train__steps=steps, train__checkpoint_every=every)
    return runs.call(train, *words, f"--workdir={folder}")


def wait_until(condition, process):
    """Waits for something in a running process, which must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.001)


def rows(folder):
    """How many rows `metrics.csv` has."""
    path = folder / "metrics.csv"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_rows(folder, new, process):
    """Waits until a run has written so many rows more than there are now."""
    goal = rows(folder) + new
    wait_until(lambda: rows(folder) >= goal, process)


def saving(folder):
    """Whether a checkpoint is there that is not complete."""
    try:
        return any(
            not (path / "manifest.json").exists() for path in (folder / "checkpoints").iterdir()
        )
    except FileNotFoundError:
        return False


def kill(process):
    """`kill -9`, after which nothing of the process runs any more."""
    process.kill()
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL


def freeze(process):
    """Stops a process where it stands, so that what it leaves can be looked at."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    """The workdir of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert go_on(texts, folder, STEPS) == 0
    return folder


def test_kill_signals_and_a_flipped_byte_change_nothing(texts, cache, whole, tmp_path, capfd):
    folder = tmp_path / "run"
    process = begin(texts, folder, cache, STEPS)
    wait_until(lambda: len(runs.steps_saved(folder)) > 1 and saving(folder), process)
    freeze(process)
    assert saving(folder)
    kill(process)

    process = begin(texts, folder, cache, STEPS)
    wait_for_rows(folder, 3, process)
    kill(process)

    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = begin(texts, folder, cache, STEPS)
        wait_for_rows(folder, 3, process)
        process.send_signal(number)
        _, error = process.communicate(timeout=PATIENCE)
        assert process.returncode == code, error
        assert "Traceback" not in error
        assert error.splitlines()[-1] == (
            "interrupted and saved; the same command goes on from here"
        )
        done = [row[0] for row in runs.losses(folder)]
        assert done == list(range(1, done[-1] + 1))
        assert done[-1] < STEPS
        assert runs.steps_saved(folder)[-1] == done[-1]

    newest, older = runs.steps_saved(folder)[-1], runs.steps_saved(folder)[-2]
    damaged = runs.flip_byte(folder / "checkpoints" / str(newest))
    capfd.readouterr()
    assert go_on(texts, folder, STEPS) == 0
    error = capfd.readouterr().err
    assert f"checkpoints/{newest} is damaged" in error
    assert damaged.name in error
    assert f"resuming from step {older}\n" in error
    assert runs.hashes(folder) == runs.hashes(whole)
    assert runs.losses(folder) == runs.losses(whole)


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="Linux alone limits other processes")
def test_no_space_left_while_saving(texts, cache, whole, tmp_path):
    """A limit on the size of a file stands in for a full device."""
    folder = tmp_path / "run"
    assert go_on(texts, folder, 4) == 0
    (saved,) = runs.steps_saved(folder)
    sizes = [path.stat().st_size for path in (folder / "checkpoints").rglob("*") if path.is_file()]
    assert max(sizes) > 4096

    process = begin(texts, folder, cache, STEPS)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    told = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert "the checkpoint of step 8 could not be written" in told[0]
    assert f"the one of step {saved} is intact. Is there space left on the device?" in told[0]
    assert runs.steps_saved(folder) == [saved]
    assert not saving(folder)
    assert go_on(texts, folder, STEPS) == 0
    assert runs.hashes(folder) == runs.hashes(whole)
    assert [row for row in runs.losses(folder) if row[1]] == [
        row for row in runs.losses(whole) if row[1]
    ]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_twenty_kills_at_random(seed, texts, cache, tmp_path):
    """At least 20 kills, of which at least 5 fall into the writing of a checkpoint."""
    steps, every, wanted, wanted_in_saves = 800, 25, 20, 5
    choose = random.Random(seed)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert go_on(texts, whole, steps, every) == 0

    kills = in_saves = 0
    for turn in itertools.count():
        process = begin(texts, folder, cache, steps, every)
        if kills >= wanted and in_saves >= wanted_in_saves:
            break
        assert turn < 3 * wanted
        if turn % 5 == 4:  # any time, start-up included
            time.sleep(choose.uniform(0, 6))
        else:
            wait_for_rows(folder, choose.randrange(1, 2 * every), process)
            in_save = turn % 2 == 1
            wait_until(lambda wanted=in_save: saving(folder) == wanted, process)
            time.sleep(choose.uniform(0, 0.03))
        freeze(process)
        assert process.poll() is None, "the run ended too early"
        in_saves += saving(folder)
        kills += 1
        kill(process)
    _, error = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, error
    assert runs.hashes(folder) == runs.hashes(whole)
    assert runs.losses(folder) == runs.losses(whole)
    print(f"{kills} kills, {in_saves} of them while a checkpoint was being written")
