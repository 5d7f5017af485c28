"""Speed of this project on this machine's CPU, beside PyTorch where that is installed.

python -m experiments.bench
python -m experiments.bench --what=train --rounds=8 --allocator=tuned,default
python -m experiments.bench --profile

Each side runs in a process of its own, one at a time and in turn, with the same number of threads
and the same allocator setting. PyTorch comes with `pip install -e '.[peers]'`.
"""

import dataclasses
import importlib.util
import json
import os
import sys
import typing

from absl import flags

from experiments import process, program, timing
from experiments.comparisons import (
    ALLOCATORS,
    MEASURES,
    describe,
    environment,
    measure,
    report,
    tables,
)
from experiments.workloads import Shape, versions
from parscale import paths
from sharding.settings import InputError

FLAGS = program.new_flags()
flags.DEFINE_list("what", list(MEASURES), f"any of {', '.join(MEASURES)}", flag_values=FLAGS)
flags.DEFINE_boolean(
    "profile", False, "instead: where the time of our training step goes", flag_values=FLAGS
)
flags.DEFINE_boolean("peers", True, "also time PyTorch and jax.nn", flag_values=FLAGS)
flags.DEFINE_list(
    "allocator", ["tuned"],
    "tuned: the one that our programs set; default: the system's; or both", flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_integer("threads", None, "of each side; default: one a core", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 5, "how often each run has its turn", flag_values=FLAGS)
flags.DEFINE_float("seconds", 1.0, "least length of a turn", flag_values=FLAGS)
flags.DEFINE_float(
    "quiet", 0.1, "share of the processor time above which a turn is repeated if it went to others",
    flag_values=FLAGS,
)  # fmt: skip
for name, kind in typing.get_type_hints(Shape).items():
    field = Shape.__dataclass_fields__[name]
    parser = program.FieldParser(kind)
    flags.DEFINE(parser, name, field.default, field.metadata["doc"], flag_values=FLAGS)
flags.DEFINE_string("json", "", "also write the figures to this file", flag_values=FLAGS)


def profile(shape, allocator: str, threads: int, options) -> str:
    """Where a training step's time goes, from its parts timed on their own."""
    from parscale import flops

    arguments = {"shape": dataclasses.asdict(shape), "streams": shape.streams}
    report("starting the parts of a step")
    worker = timing.Worker(
        "experiments.workloads:parts", arguments, environment(allocator, threads)
    )
    try:
        runs = {name: (worker, name) for name in worker.runs}
        times = timing.interleave(runs, options.rounds, options.seconds, options.quiet, report)
    finally:
        worker.close()
        report("")
    least = {name: timing.least * 1e3 for name, timing in times.items()}
    parts = {
        f"attention, {shape.layers} layers": shape.layers * least["attention"],
        f"dense products, {shape.layers} layers": shape.layers * least["dense"],
        "head and loss": least["head and loss"],
        "optimizer": least["optimizer"],
    }
    parts["rest (norms, RoPE, SwiGLU, residuals, copies)"] = least["step"] - sum(parts.values())
    model = shape.model(shape.streams)
    work = flops.train_flops(model, shape.length, shape.rows // shape.streams)
    lines = [
        f"training step, batch {shape.rows // shape.streams} x P {shape.streams}: "
        f"{least['step']:.0f} ms, of which the forward pass {least['evaluate']:.0f} ms; "
        f"{work / 1e9:.0f} GFLOP, {work / least['step'] / 1e9:.3f} TFLOP/s",
        *(f"  {name:<50}{ms:8.0f} ms {ms / least['step']:6.0%}" for name, ms in parts.items()),
        "Least times. Each part, forward and backward, was compiled and timed on its own; the rest "
        "is the difference, so it also holds what fits worse, or better, inside the whole.",
    ]
    return "\n".join(lines)


def facts(shape, threads: int, allocators: list[str], peers: bool) -> str:
    """The machine, the versions and the work."""
    names = [f"{name} {version}" for name, version in versions().items()]
    if not peers:
        names.append("PyTorch not timed")
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(shape).items())
    lines = [
        f"{cpu_name()}, {threads} threads on {cores()} cores; load {os.getloadavg()[0]:.1f}",
        f"Python {sys.version.split()[0]}, {', '.join(names)}",
        f"allocator: {' and '.join(allocators)} (tuned: GLIBC_TUNABLES={process.ALLOCATOR})",
        f"shape: {sizes}",
    ]
    return "\n".join(lines)


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "CPU of unknown name"


def have_peers() -> bool:
    """Whether torch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def main(options: flags.FlagValues) -> None:
    import jax

    # What is timed runs in processes of its own; this one is to leave a GPU's memory to them.
    jax.config.update("jax_platforms", "cpu")
    for name, known in (("what", MEASURES), ("allocator", ALLOCATORS)):
        wrong = [word for word in options[name].value if word not in known]
        if wrong or not options[name].value:
            raise InputError(
                f"--{name}={','.join(options[name].value)}: expected one or more of "
                f"{', '.join(known)}, with commas between"
            )
    threads = cores() if options.threads is None else options.threads
    if threads < 1 or options.rounds < 1 or options.seconds < 0 or not 0 <= options.quiet <= 1:
        raise InputError(
            f"--threads={threads} --rounds={options.rounds} --seconds={options.seconds} "
            f"--quiet={options.quiet}: expected at least 1, 1 and 0, and a share from 0 to 1"
        )
    shape = Shape(**{field.name: options[field.name].value for field in dataclasses.fields(Shape)})
    shape.config(shape.streams)
    if options.json:
        paths.check_file("json", options.json)
    peers = options.peers and have_peers()
    print(facts(shape, threads, options.allocator, peers), end="\n\n")
    if options.peers and not peers:
        print("PyTorch is not installed: ours alone. Add it by: pip install -e '.[peers]'\n")
    if options.profile:
        print(profile(shape, options.allocator[0], threads, options))
        return
    figures = {}
    for table in tables(shape, options.what, peers):
        measured = measure(table, shape, options.allocator, threads, options)
        print(describe(table, measured, options.quiet), end="\n\n", flush=True)
        figures[table.title] = {name: timing._asdict() for name, (_, timing) in measured.items()}
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({"shape": dataclasses.asdict(shape), "figures": figures}, file, indent=1)


if __name__ == "__main__":
    program.run(main, FLAGS)
