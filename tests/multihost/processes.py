"""Runs of several processes on this machine, which stand for as many hosts."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from parscale.metrics import read_csv

HEARTBEAT = 10
"""Seconds; fewer, and a process that waits for a busy machine looks lost."""
PATIENCE = 240
"""Seconds; a machine may be busy."""

FIELDS = {
    "model.width": 16, "model.layers": 1, "model.heads": 2, "model.kv_heads": 2,
    "model.mlp_width": 32, "model.streams": 2, "model.transform_size": 4,
    "data.length": 32, "data.batch": 8, "data.held_out": 0.3,
    "train.steps": 6, "train.learning_rate": 0.01, "train.warmup_steps": 2,
    "train.schedule": "constant", "train.log_every": 1, "train.eval_rows": 16,
    "train.sample_tokens": 0, "train.checkpoint_minutes": 0,
}  # fmt: skip
ENVIRONMENT = {
    "PARSCALE_KEEP_ALLOCATOR": "1",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    # The threads that XLA's collectives of many devices wait for.
    "NPROC": "32",
}


def arguments(texts: Path, workdir: Path, **changes) -> list[str]:
    """The command line of a tiny run; `changes` by dotted name with `__` for the dot."""
    fields = FIELDS | {"data.corpus": texts}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    words = [f"--config.{name}={value}" for name, value in fields.items()]
    return ["--config=tiny", f"--workdir={workdir}", *words]


def free_port() -> int:
    """A port that nothing listens on just now."""
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        return bound.getsockname()[1]


class Processes:
    """The training program in so many processes. A context manager that leaves none behind."""

    def __init__(self, count, words, logs, cache, devices=2, own=None, port=None, **environment):
        """Starts them.

        Args:
          count: how many.
          words: the command line of all.
          logs: folder for what each prints.
          cache: where compiled functions are kept.
          devices: of each process.
          own: process -> words that it alone is given besides.
          port: of the coordinator.
          environment: variables.
        """
        self.logs = Path(logs)
        self.logs.mkdir(parents=True, exist_ok=True)
        coordinator = f"localhost:{port or free_port()}"
        hosts = [f"--coordinator={coordinator}", f"--num_processes={count}"]
        hosts.append(f"--heartbeat_seconds={HEARTBEAT}")
        environment = os.environ | ENVIRONMENT | environment
        environment |= {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(cache),
        }
        self.all = []
        for process in range(count):
            command = [*hosts, f"--process_id={process}"] if count > 1 else []
            command += [*map(str, words), *(own or {}).get(process, [])]
            with self.log(process).open("wb") as log:
                self.all.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "experiments.train", *command],
                        stdout=log,
                        stderr=log,
                        env=environment,
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all:
            process.kill()
            process.wait()

    def log(self, process: int) -> Path:
        return self.logs / f"{process}.log"

    def text(self, process: int) -> str:
        """What a process has printed so far."""
        return self.log(process).read_text(errors="replace")

    def errors(self, process: int) -> list[str]:
        """Its lines that tell of an error."""
        return [line for line in self.text(process).splitlines() if line.startswith("error: ")]

    def wait(self, seconds: float = PATIENCE) -> list[int]:
        """The exit codes of all, once they have ended by themselves."""
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(max(deadline - time.monotonic(), 0.01)) for process in self.all]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.told()}") from None

    def wait_until(self, condition) -> None:
        """Waits for something to happen while all run."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert all(process.poll() is None for process in self.all), self.told()
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.005)

    def told(self) -> str:
        """What all printed, for a failed test."""
        return "\n".join(
            f"--- {number}\n{self.text(number)[-3000:]}" for number in range(len(self.all))
        )


def train(count, words, logs, cache, **options) -> None:
    """A run from start to end, which must succeed."""
    with Processes(count, words, logs, cache, **options) as processes:
        assert processes.wait() == [0] * count, processes.told()


def result(workdir: Path) -> dict:
    """The figures of a finished run."""
    return json.loads((workdir / "result.json").read_text())


def losses(workdir: Path) -> list[tuple]:
    """Every row of `metrics.csv`, without what depends on the clock."""
    columns = read_csv(workdir)
    names = ("step", "tokens", "loss", "grad_norm", "held_out_loss")
    return list(zip(*(columns[name] for name in names), strict=True))


def steps_done(workdir: Path) -> int:
    """The rows of `metrics.csv` so far."""
    path = workdir / "metrics.csv"
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def steps_saved(workdir: Path) -> list[int]:
    """The complete checkpoints."""
    return sorted(
        int(path.parent.name) for path in (workdir / "checkpoints").glob("*/manifest.json")
    )
