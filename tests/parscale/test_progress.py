"""Progress: one live line on a terminal, plain lines elsewhere; honest times."""

import io
import re

import pytest

from parscale import progress
from parscale.progress import Progress, format_seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when it is told to."""

    class Clock:
        now = 1000.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def test_plain_lines_come_by_steps_and_by_time(clock):
    file = io.StringIO()
    with Progress(95, every=20, seconds=30, file=file) as shown:
        for step in range(1, 96):
            clock.now += 31 if step == 47 else 1
            shown.update(step, loss=2.5, tokens=100)
    steps = [int(re.match(r"step (\d+)/95 ", line)[1]) for line in file.getvalue().splitlines()]
    assert steps == [20, 40, 47, 60, 80, 95]
    assert "\r" not in file.getvalue()


def test_speed_is_of_this_process_and_elapsed_of_the_whole_run(clock):
    file = io.StringIO()
    with Progress(300, first=100, elapsed=3600, every=1, file=file) as shown:
        clock.now += 60
        shown.update(101, loss=1.5, tokens=500)
        assert shown.eta(101) is None
        clock.now += 20
        shown.update(111, loss=1.23456, tokens=5000)
        # 10 steps in 20 s: 189 more take 378 s, whatever the first 100 and compiling took.
        assert shown.eta(111) == pytest.approx(378)
        assert shown.elapsed() == pytest.approx(3680)
        assert shown.eta(300) == 0
    assert file.getvalue().splitlines() == [
        "step 101/300  loss 1.5000  8 tokens/s  elapsed 1h01m  ETA ?",
        "step 111/300  loss 1.2346  69 tokens/s  elapsed 1h01m  ETA 6m18s",
    ]


def test_a_terminal_has_one_line_that_is_written_over():
    file = Terminal()
    with Progress(50, first=10, file=file) as shown:
        for step in range(11, 51):
            shown.update(step, loss=1.0, tokens=10)
        shown.print("held-out loss 1.5")
    text = file.getvalue()
    assert text.count("\n") == 2  # of the printed line, and at the end
    assert "held-out loss 1.5\n" in text
    assert "step 50/50  loss 1.0000" in text.split("\r")[-1]
    assert "100%" in text.split("\r")[-1]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (3599.7, "1h00m"),
        (7643, "2h07m"),
        (273600, "3d04h"),
    ],
)
def test_seconds_are_short(seconds, text):
    assert format_seconds(seconds) == text
