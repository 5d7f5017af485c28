"""Timing of work in processes of its own, one of them running at a time.

A worker is a process that builds the runs of a workload once, stays alive, and times one of them
whenever it is asked to; in between it sleeps. What is compared shares neither a process nor a
thread pool, and sees the same minutes of the machine: A B A B ...

The two sides exchange lines of JSON. The child answers its first line when the runs have been
warmed up, and then one line per request.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

PATIENCE = 3
"""Rounds are repeated for quiet up to this many times the number that was asked for."""

SETTLE = 0.2
"""Seconds between two workers' runs: idle threads of a pool may spin on for a while."""


class Timings(NamedTuple):
    """Times of one run, and what share of the processor time other processes had meanwhile.

    Attributes:
      seconds: of each repetition.
      others: 0 to 1, mean over the rounds kept; None where the system does not tell.
    """

    seconds: list[float]
    others: float | None

    @property
    def least(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Worker:
    """A child process with the runs of one workload.

    Args:
      call: `module:function`; the function takes `arguments` and returns a dict of runs, each a
        function of no arguments that has done its work when it returns.
      arguments: keyword arguments for it, as JSON can hold them.
      environment: variables to set, or (None) to remove, beside the present ones.

    Raises:
      RuntimeError: the workload failed; the message holds the end of what it wrote.
    """

    def __init__(
        self, call: str, arguments: Mapping[str, Any], environment: Mapping[str, str | None]
    ):
        self.call = call
        merged = {**os.environ, **environment}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "experiments.timing", call, json.dumps(arguments)],
            env={name: value for name, value in merged.items() if value is not None},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        self.runs: list[str] = self._answer()

    def time(self, run: str, seconds: float) -> Timings:
        """Times of `run`, repeated for at least so many seconds and at least once."""
        self._process.stdin.write(json.dumps([run, seconds]) + "\n")
        self._process.stdin.flush()
        return Timings(*self._answer())

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{self.call} failed:\n{self._errors.read()[-4000:]}")
        return json.loads(line)


def interleave(
    runs: Mapping[str, tuple[Worker, str]],
    rounds: int,
    seconds: float,
    quiet: float,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, Timings]:
    """Times several runs in turn, `rounds` times over.

    A round of a run in which other processes took more than `quiet` of the processor time is kept
    only if too few better ones are found in `PATIENCE` times as many rounds.

    Args:
      runs: by name, a worker and which of its runs.
      rounds: how often each is timed.
      seconds: for how long at least each time.
      quiet: share of the processor time, 0 to 1.
      report: is told what is being done.
    """
    found: dict[str, list[Timings]] = {name: [] for name in runs}
    for number in range(rounds * PATIENCE):
        loud = [name for name in runs if len(_quiet(found[name], quiet)) < rounds]
        if not loud:
            break
        # All take part while one of them has too few rounds, so that each sees the same minutes.
        for name, (worker, run) in runs.items():
            report(f"round {number + 1}: {name}")
            time.sleep(SETTLE)
            found[name].append(worker.time(run, seconds))
    result = {}
    for name, timings in found.items():
        kept = _quiet(timings, quiet)
        if len(kept) < rounds:
            kept = sorted(timings, key=lambda timing: timing.others or 0.0)[:rounds]
        shares = [timing.others for timing in kept if timing.others is not None]
        result[name] = Timings(
            [second for timing in kept for second in timing.seconds],
            statistics.mean(shares) if shares else None,
        )
    return result


def _quiet(timings: list[Timings], quiet: float) -> list[Timings]:
    return [timing for timing in timings if (timing.others or 0.0) <= quiet]


def busy_seconds() -> float | None:
    """Processor time that this machine has spent at work since it started, hypervisor's theft
    included; None where the system does not tell.
    """
    try:
        with open("/proc/stat", encoding="ascii") as file:
            fields = [int(field) for field in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    idle, iowait = fields[3:5]
    return (sum(fields) - idle - iowait) / os.sysconf("SC_CLK_TCK")


def measure(run: Callable[[], None], seconds: float) -> Timings:
    """Times of `run`, repeated for at least so many seconds and at least once."""
    times = []
    start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    while not times or time.perf_counter() - start < seconds:
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    if busy is None:
        return Timings(times, None)
    wall = time.perf_counter() - start
    others = (busy_seconds() - busy) - (time.process_time() - own)
    return Timings(times, min(max(others / (wall * (os.cpu_count() or 1)), 0.0), 1.0))


def serve(call: str, arguments: Mapping[str, Any]) -> None:
    """The child's side: builds the runs, then answers requests until its input ends."""
    # Libraries may print: only answers may reach the parent.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, function = call.split(":")
    runs = getattr(importlib.import_module(module), function)(**arguments)
    for run in runs.values():
        run()
        run()
    answers.write(json.dumps(list(runs)) + "\n")
    for line in sys.stdin:
        name, seconds = json.loads(line)
        answers.write(json.dumps(measure(runs[name], seconds)) + "\n")


if __name__ == "__main__":
    serve(sys.argv[1], json.loads(sys.argv[2]))
