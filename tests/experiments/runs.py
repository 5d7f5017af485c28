"""A run small enough to be tested whole, and its programs as a person meets them."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments import program
from parscale.metrics import read_csv
from parscale.stored_arrays import RECORD

MODEL = {
    "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "mlp_width": 32, "streams": 2,
    "transform_size": 4,
}  # fmt: skip
# A constant learning rate: more steps then begin like fewer.
TRAIN = {
    "steps": 8, "learning_rate": 0.01, "warmup_steps": 2, "schedule": "constant", "log_every": 1,
    "eval_rows": 16, "sample_tokens": 0, "checkpoint_minutes": 0,
}  # fmt: skip
DATA = {"length": 32, "batch": 8, "held_out": 0.3}

COMPILER = {
    "jax_disable_most_optimizations": True,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
}


@contextlib.contextmanager
def compiler(cache: Path) -> Iterator[None]:
    """Nearly all the time of a tiny run goes into compiling it: inside, little and only once."""
    settings = COMPILER | {"jax_compilation_cache_dir": str(cache)}
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def arguments(texts: Path, **changes) -> list[str]:
    """The command line of the tiny run; `changes` by dotted name with `__` for the dot."""
    fields = {f"model.{name}": value for name, value in MODEL.items()}
    fields |= {f"train.{name}": value for name, value in TRAIN.items()}
    fields |= {f"data.{name}": value for name, value in DATA.items()}
    fields |= {"data.corpus": texts}
    fields |= {name.replace("__", "."): value for name, value in changes.items()}
    return ["--config=tiny", *(f"--config.{name}={value}" for name, value in fields.items())]


def call(module, *words) -> int:
    """Runs a program in this process, which is faster. Returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        program.run(module.main, module.FLAGS, [module.__name__, *map(str, words)])
    return exit_.value.code


def refusal(capture, module, *words) -> str:
    """The one line on stderr with which a program refuses its arguments as bad input."""
    capture.readouterr()
    code = call(module, *words)
    out, error = capture.readouterr()
    assert code == 2, error
    assert out == ""
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


def start(name: str, *words, cache: Path) -> subprocess.Popen:
    """The program `experiments.<name>` in a process of its own, on as many devices as here."""
    environment = {
        "PARSCALE_KEEP_ALLOCATOR": "1",
        "JAX_NUM_CPU_DEVICES": "8",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
    } | {name.upper(): str(value) for name, value in COMPILER.items()}
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{name}", *map(str, words)],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(run: Path) -> dict:
    """The figures of a finished run."""
    return json.loads((run / "result.json").read_text())


def hashes(run: Path) -> tuple[str, str]:
    """Of the final weights, and of the examples consumed in order."""
    figures = result(run)
    return figures["weights_sha256"], figures["examples_sha256"]


def losses(run: Path) -> list[tuple]:
    """Every row of `metrics.csv`, without what depends on the clock."""
    columns = read_csv(run)
    return list(zip(*(columns[name] for name in ("step", "loss", "held_out_loss")), strict=True))


def steps_saved(run: Path) -> list[int]:
    """The complete checkpoints."""
    return sorted(int(path.parent.name) for path in (run / "checkpoints").glob("*/manifest.json"))


def flip_byte(folder: Path) -> Path:
    """Changes one byte in the middle of a checkpoint's largest file of arrays; returns the file."""
    files = [path for path in folder.rglob("d/*") if path.is_file() and RECORD not in path.parts]
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def copy(run: Path, target: Path) -> Path:
    """A run that a test may spoil."""
    return Path(shutil.copytree(run, target))
