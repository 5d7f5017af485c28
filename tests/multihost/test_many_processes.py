"""Four processes on meshes whose axes cross them, checkpoints that others read, and lost processes.

Bits are compared where the number of devices, and with it the order of sums, is the same.
"""

import random
import shutil
import signal
import time

import processes
import pytest
from processes import HEARTBEAT, Processes

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

STEPS = 4
TRIALS = 20
IN_SAVES = 5
"""Of the trials, at least so many kill while a checkpoint is being written."""
DETECTION = HEARTBEAT + 2
"""Seconds in which the others end after one was lost."""


def mesh(**sizes):
    """Changes of the configuration for a mesh with these sizes."""
    return {"mesh__data": 1} | {f"mesh__{axis}": size for axis, size in sizes.items()}


@pytest.mark.parametrize(
    "sizes",
    [
        {"stream": 8},
        {"fsdp": 2, "stream": 2, "tensor": 2},
        {"sequence": 8},
    ],
    ids=str,
)
def test_meshes_across_hosts_equal_one_process(sizes, texts, cache, tmp_path):
    """Where stream or tensor cross hosts, these share rows: 4 hosts of 2 devices."""
    changes = mesh(**sizes) | {"train__steps": STEPS, "model__streams": 8, "train__log_every": 2}
    several, alone = tmp_path / "several", tmp_path / "alone"
    logs = tmp_path / "logs"
    words = processes.arguments(texts, several, **changes)
    processes.train(4, words, logs, cache, devices=2)
    processes.train(1, processes.arguments(texts, alone, **changes), logs, cache, devices=8)
    assert [row[:2] for row in processes.losses(several)] == [
        row[:2] for row in processes.losses(alone)
    ]
    ours, theirs = processes.result(several), processes.result(alone)
    assert ours["examples_sha256"] == theirs["examples_sha256"]
    assert ours["tokens"] == theirs["tokens"]
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-6)


@pytest.fixture(scope="module")
def saved(texts, cache, tmp_path_factory):
    """The workdir of a run that four processes finished, and their logs beside it."""
    folder = tmp_path_factory.mktemp("saved")
    changes = mesh(fsdp=4, tensor=2) | {"train__steps": STEPS, "train__sample_tokens": 3}
    words = processes.arguments(texts, folder / "run", **changes)
    processes.train(4, words, folder / "logs", cache, devices=2)
    return folder / "run"


@pytest.fixture
def restored(texts, cache, saved, tmp_path):
    """A function: the result of so many processes that go on from `saved` with no step to do."""

    def read(count, devices, *flags, **changes):
        folder = shutil.copytree(saved, tmp_path / f"{count}{changes}{flags}")
        (folder / "result.json").unlink()
        words = processes.arguments(texts, folder, train__steps=STEPS, **changes)
        processes.train(count, [*words, *flags], tmp_path / "logs", cache, devices=devices)
        return processes.result(folder)

    return read


def test_process_0_alone_shows_samples(saved):
    told = [(saved.parent / "logs" / f"{number}.log").read_text() for number in range(4)]
    assert ["--- sample" in text for text in told] == [True, False, False, False]


def test_four_save_and_two_or_one_restore(saved, restored):
    """Bit-identical on other meshes and hosts."""
    whole = processes.result(saved)["weights_sha256"]
    assert restored(2, 2, **mesh(fsdp=2, stream=2))["weights_sha256"] == whole
    assert restored(2, 1, **mesh(tensor=2))["weights_sha256"] == whole
    assert restored(1, 1)["weights_sha256"] == whole
    assert restored(1, 8, **mesh(data=2, fsdp=2, tensor=2))["weights_sha256"] == whole


def test_four_save_and_others_go_on_with_more_streams(saved, restored):
    """Over a stream axis, too, that the streams that were saved do not divide over.

    What is new is drawn on another mesh, where its last bit may be another.
    """
    loss = restored(1, 1, "--grow_streams", model__streams=4)["held_out_loss"]
    assert loss != processes.result(saved)["held_out_loss"]
    for sizes in ({"stream": 4}, {"fsdp": 2, "stream": 2}):
        grown = restored(2, 2, "--grow_streams", model__streams=4, **mesh(**sizes))
        assert grown["streams"] == 4
        assert grown["held_out_loss"] == pytest.approx(loss, rel=1e-6)


def ended_after(running, lost, begun):
    """Seconds after `begun` until the last of the others ended, each with a code and a line."""
    others = [number for number in range(len(running.all)) if number != lost]
    for number in others:
        running.all[number].wait(max(begun + DETECTION + 20 - time.monotonic(), 0.01))
    seconds = time.monotonic() - begun
    for number in others:
        assert running.all[number].returncode not in (0, None), running.told()
        assert any(f"process {lost} on" in line for line in running.errors(number)), running.told()
    return seconds


def saving(folder):
    """Whether a checkpoint is there that is not complete."""
    found = folder.glob("checkpoints/*")
    return any(not (path / "manifest.json").exists() for path in found)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 2])
def test_one_is_lost_and_the_others_end(lost, number, texts, cache, tmp_path):
    folder = tmp_path / "run"
    words = processes.arguments(texts, folder, train__steps=10_000, data__batch=12)
    with Processes(3, words, tmp_path / "logs", cache) as three:
        three.wait_until(lambda: processes.steps_done(folder) >= 3)
        begun = time.monotonic()
        three.all[lost].send_signal(number)
        assert ended_after(three, lost, begun) < DETECTION


def test_ctrl_c_of_one_saves_on_all(texts, cache, tmp_path):
    folder = tmp_path / "run"
    words = processes.arguments(texts, folder, train__steps=10_000)
    with Processes(2, words, tmp_path / "logs", cache) as two:
        two.wait_until(lambda: processes.steps_done(folder) >= 3)
        two.all[0].send_signal(signal.SIGINT)
        assert two.wait() == [130, 143], two.told()
    assert processes.steps_saved(folder) == [processes.losses(folder)[-1][0]]


def test_one_that_fails_ends_the_others(texts, cache, tmp_path):
    """A process that cannot read what the others can."""
    own = {1: [f"--config.data.corpus={tmp_path / 'nowhere'}"]}
    words = processes.arguments(texts, tmp_path / "run")
    with Processes(2, words, tmp_path / "logs", cache, own=own) as two:
        assert two.wait() == [2, 2], two.told()
        assert all("corpus" in two.errors(number)[0] for number in range(2))


def test_a_workdir_that_is_not_shared(texts, cache, tmp_path):
    own = {1: [f"--workdir={tmp_path / 'elsewhere'}"]}
    words = processes.arguments(texts, tmp_path / "run")
    with Processes(2, words, tmp_path / "logs", cache, own=own) as two:
        assert two.wait() == [2, 2], two.told()
        assert all("storage that all share" in two.errors(number)[0] for number in range(2))


def test_kills_at_random_change_nothing(texts, cache, tmp_path):
    """Restarted after each kill, a run ends with the weights of one that nothing befell."""
    choose = random.Random(0)
    steps, every = 45 * TRIALS, 20
    changes = {"train__steps": steps, "train__checkpoint_every": every, "train__log_every": 1}
    whole, folder, logs = tmp_path / "whole", tmp_path / "run", tmp_path / "logs"
    processes.train(2, processes.arguments(texts, whole, **changes), logs, cache)
    words = processes.arguments(texts, folder, **changes)
    kills = in_saves = 0
    longest = 0.0
    while kills < TRIALS or in_saves < IN_SAVES:
        assert kills < 3 * TRIALS
        done = max(processes.steps_saved(folder), default=0)
        with Processes(2, words, logs, cache) as two:
            if kills % 5 == 4:  # any time, start-up included
                time.sleep(choose.uniform(0, 6))
            else:
                # One or two checkpoints later, so that the trials do not stand still.
                goal = done + every + choose.randrange(every)
                two.wait_until(lambda goal=goal: processes.steps_done(folder) >= goal)
                if kills % 2:
                    two.wait_until(lambda: saving(folder))
            lost = choose.randrange(2)
            two.all[lost].send_signal(signal.SIGSTOP)
            in_save = saving(folder)
            joined = "devices: " in two.text(0)
            begun = time.monotonic()
            two.all[lost].kill()
            if joined:
                longest = max(longest, ended_after(two, lost, begun))
            kills += 1
            in_saves += in_save
        assert max(processes.steps_saved(folder), default=0) >= done
    processes.train(2, words, logs, cache)
    assert processes.result(folder)["weights_sha256"] == processes.result(whole)["weights_sha256"]
    assert processes.losses(folder) == processes.losses(whole)
    assert longest < DETECTION
    print(f"\n{kills} kills, {in_saves} of them in a save; the others ended within {longest:.1f} s")
