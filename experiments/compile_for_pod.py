"""Compiles a step of training or decoding for a pod of TPUs, with none at hand.

    python -m experiments.compile_for_pod --config=paper_1b6 --config.model.streams=4 \\
        --topology=v5e:16x16 --config.mesh.fsdp=64 --config.mesh.stream=4
    python -m experiments.compile_for_pod ... --program=decode --rows=256 --cache=4096
    python -m experiments.compile_for_pod ... --fit
    python -m experiments.compile_for_pod ... --search=fsdp,stream,tensor
    python -m experiments.compile_for_pod --table

Says what each chip needs: memory, operations, bytes between chips by mesh axis, and the least time
of a step. Nothing is measured: memory is the compiler's (libtpu's own), the time a bound made of
the chip's published rates. A compilation takes one to several minutes.

Topologies: v5e:16x16, v5litepod-256, v6e-256, v5p-128 (64 chips), tpu7x:4x4x4, ...; 2xv5e:16x16
are two slices, which the data axis crosses. Exit code 1: it does not fit.
"""

import csv
import dataclasses
import pathlib
import sys

from absl import flags

from experiments import program
from sharding.mesh import AXES
from sharding.pods.topologies import parse_topology
from sharding.settings import InputError

FLAGS = program.new_flags(config=True)
flags.DEFINE_string("topology", "", "such as v5e:16x16, v5p-128, 2xv5e-256", flag_values=FLAGS)
flags.DEFINE_enum("program", "train", ["train", "decode"], "which step", flag_values=FLAGS)
flags.DEFINE_integer("rows", 256, "rows of a decoding step, over all chips", flag_values=FLAGS)
flags.DEFINE_integer("cache", 2048, "slots of a decoding step's cache", flag_values=FLAGS)
flags.DEFINE_boolean(
    "fit", False, "instead: the largest batch that fits, by bisection", flag_values=FLAGS
)
flags.DEFINE_list(
    "search", [], "instead: every mesh that divides, these axes taking what the others leave",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_boolean(
    "table", False, "instead: the paper's 1.6B with P = 4 on five pods, to --output",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string(
    "output", "", "where --table writes; default: experiments/results/pod.csv", flag_values=FLAGS
)
flags.DEFINE_list(
    "only", [], "of --table: these pods alone; the file's other rows stay", flag_values=FLAGS
)

OUTPUT = pathlib.Path(__file__).parent / "results" / "pod.csv"
TABLE = (
    ("v5e:16x16", {"fsdp": 64, "stream": 4}),
    ("v6e:16x16", {"fsdp": 64, "stream": 4}),
    ("v5p:8x8x8", {"fsdp": 128, "stream": 4}),
    ("v5p:16x16x16", {"data": 4, "fsdp": 256, "stream": 4}),
    ("2xv5e:16x16", {"data": 2, "fsdp": 64, "stream": 4}),
)
"""Pods of the table, and the sizes of their meshes. The batch is the paper's, 1024 rows of 2048."""


def main(options: flags.FlagValues) -> int | None:
    if options.table:
        return make_table(options)
    if options.only:
        raise InputError("--only: only --table takes it")
    config, topology = program.load_config(options), parse_topology(options.topology)
    if options.fit and options.search:
        raise InputError("--fit and --search: give one of them")
    decode = None
    if options.program == "decode":
        for name in ("rows", "cache"):
            if options[name].value < 1:
                raise InputError(f"--{name}={options[name].value}: expected at least 1")
        decode = options.rows, options.cache
    else:
        for name in ("rows", "cache"):
            if options[name].present:
                raise InputError(f"--{name}: only --program=decode takes it")
    if options.fit:
        return fit(config, topology, decode)
    if options.search:
        return search(config, topology, decode, options.search)
    from parscale import pod_report

    step = compiled(config, topology, decode)
    if isinstance(step, Exception):
        return refused(step)
    print(pod_report.describe(step))
    return None


def compiled(config, topology, decode: tuple[int, int] | None, apart: bool = False):
    """A `PodStep`, or the `DoesNotFitError` or `InputError` that there was instead."""
    from parscale import pod_search
    from parscale.pod_step import Decode

    arguments = (config, topology, decode and Decode(*decode))
    if apart:
        return pod_search.apart(pod_search.outcome, *arguments)
    return pod_search.outcome(*arguments)


def refused(error: Exception) -> int:
    """Raises bad input again; tells what does not fit, and returns the exit code for that."""
    if isinstance(error, InputError):
        raise error
    return program.fail(error)


def fit(config, topology, decode) -> int | None:
    """Prints the largest batch that fits."""
    from parscale import pod_report, pod_search
    from sharding.mesh import mesh_shape

    shape = mesh_shape(config.mesh, topology.device_count)
    sizes = dict(zip(AXES, shape, strict=True))
    parts = sizes["data"] * sizes["fsdp"] * (1 if decode else config.train.accumulate)
    name = "--rows" if decode else "--config.data.batch"
    best = None

    def fits(batch: int) -> bool:
        nonlocal best
        changed, tried = config, decode and (batch, decode[1])
        if not decode:
            changed = dataclasses.replace(
                config, data=dataclasses.replace(config.data, batch=batch)
            )
        found = compiled(changed, topology, tried, apart=True)
        if isinstance(found, InputError):
            raise found
        does = not isinstance(found, Exception)
        best = found if does else best
        peak = pod_report.gib(found.needs.peak) + " GiB" if does else str(found)
        print(f"{name}={batch} ({batch // parts} for each part): {peak}", flush=True)
        return does

    found = pod_search.largest_that_fits(fits, parts)
    if found.fits is None:
        what = f"{name}={parts}, one row for each part of the batch, does not fit"
        return program.fail(RuntimeError(what))
    print(f"\nThe largest that fits: {name}={found.fits}\n")
    print(pod_report.describe(best))
    return None


def search(config, topology, decode, axes: list[str]) -> int | None:
    """Prints the meshes, the fastest by its bound first."""
    from parscale import pod_report, pod_search
    from parscale.text import table

    for axis in axes:
        if axis not in AXES:
            raise InputError(f"--search={axis}: expected some of {', '.join(AXES)}")
    done, refused_meshes = [], []
    for mesh in pod_search.divisions(config.mesh, axes, topology.device_count):
        changed = dataclasses.replace(config, mesh=mesh)
        reason = pod_search.why_not(changed, topology) if decode is None else ""
        found = reason or compiled(changed, topology, decode, apart=True)
        if isinstance(found, str | Exception):
            refused_meshes.append(f"{mesh.describe()}: {found}")
            print(f"no   {refused_meshes[-1]}", flush=True)
        else:
            done.append(found)
            print(f"yes  {mesh.describe()}: {1e3 * found.bound:.2f} ms", flush=True)
    if not done:
        raise InputError("no mesh of these axes can be compiled; see above why")
    rows = [["mesh", "step at least, ms", "if nothing overlaps", "MFU at most", "peak, GiB"]]
    for step in sorted(done, key=lambda step: (step.bound, sum(step.seconds.values()))):
        rows.append(
            [
                step.config.mesh.describe(),
                f"{1e3 * step.bound:.2f}",
                f"{1e3 * sum(step.seconds.values()):.2f}",
                f"{step.mfu_bound:.1%}",
                pod_report.gib(step.needs.peak),
            ]
        )
    print(f"\n{table(rows)}")
    return None


def make_table(options: flags.FlagValues) -> int | None:
    """Compiles the table's steps, writes them as they come, and prints them in Markdown."""
    given = [name for name in ("topology", "config", "fit", "search", "rows", "cache", "program")
             if options[name].present]  # fmt: skip
    given += [f"config.{name}" for name in program.changes(options)]
    if given:
        raise InputError(f"--table compiles steps of its own: leave out --{given[0]}")
    from parscale import paths, pod_report
    from sharding.mesh import MeshConfig

    names = [name for name, _ in TABLE]
    for name in options.only:
        if name not in names:
            raise InputError(f"--only={name}: expected some of {', '.join(names)}")
    path = pathlib.Path(options.output or OUTPUT)
    paths.check_file("output", path)
    rows = {}
    if options.only and path.exists():
        with path.open(newline="") as file:
            rows = {row["topology"]: row for row in csv.DictReader(file)}
    preset = program.load_preset("paper_1b6")
    model = dataclasses.replace(preset.model, streams=4)
    for name, sizes in TABLE:
        if options.only and name not in options.only:
            continue
        mesh = MeshConfig(**{"data": 1, **sizes})
        config = dataclasses.replace(preset, model=model, mesh=mesh)
        print(f"{name}: {mesh.describe()}", file=sys.stderr, flush=True)
        step = compiled(config, parse_topology(name), None, apart=True)
        if isinstance(step, Exception):
            return refused(step)
        rows[name] = pod_report.row(step)
        done = [rows[name] for name in names if name in rows]
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[name]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(done)
    print(pod_report.markdown(done))
    return None


if __name__ == "__main__":
    program.run(main, FLAGS)
