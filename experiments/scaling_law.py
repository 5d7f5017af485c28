"""The parallel scaling law L = (A / (N (k ln P + 1)))^alpha + E: runs, fits, figures, predictions.

    python -m experiments.scaling_law sweep --config=experiments/configs/law_cpu.py --workdir=law
    python -m experiments.scaling_law fit --data=published --figure=law.png
    python -m experiments.scaling_law plot --data=law/runs.csv --figure=law.svg
    python -m experiments.scaling_law compare --data=controls/runs.csv --baseline=base-P1
    python -m experiments.scaling_law predict --params=1.6e9 --streams=8 --target=1.02

N counts parameters without embeddings, P streams; losses are in nats per token.
"""

import json
import math
import sys
from pathlib import Path

from absl import flags

from experiments import process, program
from sharding.settings import InputError, nearest

PUBLISHED = Path(__file__).parent / "results" / "published.csv"
# The fit that the ParScale paper prints (arXiv 2505.10475, figure 2): E, A, alpha, k and R2.
PUBLISHED_FITS = {
    "stack": (0.6912, 1.131e7, 0.1894, 0.3935, 0.9978),
    "pile": (1.2888, 1.974e8, 0.1963, 0.3345, 0.9987),
}
STREAMS = (1, 2, 4, 8)  # of the sizes that reach a target loss
BYTES = 2  # of a parameter in bfloat16
DATA_HELP = "published, or a CSV file with columns corpus, params, streams, loss, perhaps seed"

FIT = program.new_flags()
flags.DEFINE_string("data", "published", DATA_HELP, flag_values=FIT)
flags.DEFINE_string("figure", "", "also draw to this file, .png or .svg", flag_values=FIT)
flags.DEFINE_integer("bootstrap", 1000, "draws behind the 95 % intervals", flag_values=FIT)
flags.DEFINE_string("json", "", "also write the figures to this file", flag_values=FIT)

PLOT = program.new_flags()
flags.DEFINE_string("data", "published", DATA_HELP, flag_values=PLOT)
flags.DEFINE_string("figure", "", "file to draw to, .png or .svg", flag_values=PLOT)

PREDICT = program.new_flags()
flags.DEFINE_string("data", "published", DATA_HELP, flag_values=PREDICT)
flags.DEFINE_string("corpus", "", "which corpus of the data; default: all", flag_values=PREDICT)
flags.DEFINE_list("law", None, "E,A,alpha,k of a law to take in place of data", flag_values=PREDICT)
flags.DEFINE_float("params", None, "N, parameters without embeddings", flag_values=PREDICT)
flags.DEFINE_integer("streams", 1, "P, number of streams", flag_values=PREDICT)
flags.DEFINE_float("target", None, "loss to be reached", flag_values=PREDICT)

COMPARE = program.new_flags()
flags.DEFINE_string("data", "", "the table of a sweep", flag_values=COMPARE)
flags.DEFINE_string(
    "baseline", "", "the group to compare with: the name of its runs without -s<seed>",
    flag_values=COMPARE,
)  # fmt: skip

SWEEP = program.new_flags()
flags.DEFINE_string(
    "config", None, "a Python file with get_sweep(), or the name of one of ours",
    flag_values=SWEEP,
)  # fmt: skip
flags.DEFINE_string(
    "workdir", "", "folder of the sweep; default: runs/<name of the file>", flag_values=SWEEP
)
flags.DEFINE_string(
    "only", "*", "do only the runs with such names, and what they begin from", flag_values=SWEEP
)
flags.DEFINE_integer(
    "devices", None, "spread the runs over so many devices; default: all there are, 1 on a CPU",
    flag_values=SWEEP,
)  # fmt: skip


def sweep(options: flags.FlagValues) -> int | None:
    """Trains every run of a grid that is not finished, and writes one table, <workdir>/runs.csv.

    The same command again goes on: finished runs are not repeated, begun ones go on from their last
    checkpoint. Ctrl-C and SIGTERM save first. A run's own progress is in <workdir>/<run>/log.txt.
    """
    from parscale.sweep import TABLE, Sweep

    if options.config is None:
        raise InputError(f"--config is missing: expected {program.a_preset('get_sweep')}")
    workdir = options.workdir or program.default_workdir(options)
    grid = program.call_preset(options.config, "get_sweep", Sweep)
    if options.devices is not None and options.devices < 1:
        raise InputError(f"--devices={options.devices}: expected at least 1")
    import jax

    from parscale import checkpoints, run
    from parscale.sweep import run_sweep

    # Runs that differ in their seed share one program: it is compiled once and then read.
    jax.config.update("jax_compilation_cache_dir", str(Path(workdir).absolute() / "compiled"))
    devices = jax.devices()[: options.devices]
    if options.devices is not None and options.devices > len(devices):
        raise InputError(
            f"--devices={options.devices}: there are {len(devices)}"
            + ("; JAX_NUM_CPU_DEVICES=<n> in the environment makes n of a CPU" * _on_cpu(devices))
        )
    with process.Interruption() as interruption:
        try:
            rows = run_sweep(
                grid,
                workdir,
                devices,
                only=options.only,
                should_stop=lambda: interruption.requested is not None,
                report=lambda line: print(line, flush=True),
            )
        except (run.DivergedError, checkpoints.SaveError, OSError) as error:
            return program.fail(error)
    print(f"{len(rows)} of {len(grid.points)} runs in {Path(workdir) / TABLE}")
    if interruption.requested:
        print("interrupted and saved; the same command goes on from here", file=sys.stderr)
    return interruption.exit_code


def _on_cpu(devices: list) -> bool:
    return devices[0].platform == "cpu"


def fit(options: flags.FlagValues) -> None:
    """Fits the law and its rivals to a table of runs, with intervals and left-out predictions.

    The data are the paper's 48 losses, or a CSV file with a row for each run. Where it has a column
    `seed`, the spread over seeds and the paired effect of P are printed too.
    """
    if options.bootstrap < 40:
        raise InputError(
            f"--bootstrap={options.bootstrap}: expected at least 40, for 2.5 % of the draws "
            "to lie beyond each end of an interval"
        )
    from parscale import law_figures, law_study, paths, scaling_law

    data = _read(options.data)
    for corpus, points in data.items():
        _named(corpus, scaling_law.check_identifiable, points)
    if options.figure:
        law_figures.check_path(options.figure)
    if options.json:
        paths.check_file("json", options.json)
    figures, drawn = {}, {}
    for corpus, points in data.items():
        published = PUBLISHED_FITS[corpus] if options.data == "published" else None
        figures[corpus], law = law_study.study(points, published, options.bootstrap)
        drawn[corpus] = points, law
        text = law_study.describe(figures[corpus])
        print(f"{corpus}\n{'=' * len(corpus)}\n{text}\n", flush=True)
    if options.figure:
        law_figures.write_law_figure(options.figure, drawn)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)


def plot(options: flags.FlagValues) -> None:
    """Draws loss against N for each P, and against ln P for each N, with the fitted law.

    Where the points are too few for a fit, lines join them. Bars are one standard deviation over
    seeds.
    """
    if not options.figure:
        raise InputError("--figure is missing: expected a file that ends in .png or .svg")
    from parscale import law_figures, scaling_law

    data, runs = _read(options.data), {}
    law_figures.check_path(options.figure)
    for corpus, points in data.items():
        try:
            runs[corpus] = points, scaling_law.fit(points).law
        except InputError as error:
            print(f"{corpus}: lines join the points, no law is fitted: {error}")
            runs[corpus] = points, None
    law_figures.write_law_figure(options.figure, runs)
    print(options.figure)


def predict(options: flags.FlagValues) -> None:
    """Predicts the loss of N parameters with P streams, and what it takes to reach a loss.

    Prints the size at P = 1 with the same loss. For --target, the N for each P that reaches it,
    with the matrix-product FLOPs of decoding one token, 2 N P (embeddings and attention to the
    context left out), and the bytes of N parameters in bfloat16.
    """
    if options.params is None and options.target is None:
        raise InputError("--params is missing: expected a number of parameters, or a --target loss")
    for name in ("params", "streams", "target"):
        value = options[name].value
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise InputError(f"--{name}={value}: expected a number above 0")
    laws = _laws(options)
    if options.target is not None and options.target <= min(law.E for law in laws.values()):
        next(iter(laws.values())).params_for(options.target, 1)  # says why it cannot
    for corpus, law in laws.items():
        k, most = law.shape[0], max(options.streams, *STREAMS)
        if k * math.log(most) <= -1:
            raise InputError(f"{corpus}: k = {k:.4g} gives no k ln P + 1 above 0 at P = {most}")
    for corpus, law in laws.items():
        values = (f"{n} {x:.4g}" for n, x in zip(law.form.names, law.values, strict=True))
        print(f"{corpus}: {', '.join(values)}")
        if options.params is not None:
            print(f"  {_describe_loss(law, options.params, options.streams)}")
        if options.target is not None:
            print(f"  {_describe_target(law, options.target, {*STREAMS, options.streams})}")


def compare(options: flags.FlagValues) -> None:
    """The groups of a sweep beside one of them, seed by seed."""
    from parscale import sweep_groups
    from parscale.text import table

    if not options.data:
        raise InputError("--data is missing: expected the table of a sweep, <workdir>/runs.csv")
    groups = sweep_groups.read_groups(options.data)
    print(table(sweep_groups.compare(groups, options.baseline)))
    print(
        "Mean losses, and mean paired differences over the seeds of both with 95 % Student t "
        "intervals; FLOPs of training as ratios."
    )


def _describe_loss(law, params: float, streams: int) -> str:
    from parscale.law_figures import short

    return (
        f"N {short(params)}, P {streams}: loss {law.loss(params, streams):.4f}, "
        f"as N {short(law.equal_params(params, streams))} at P 1 "
        f"({law.multiplier(streams):.3f} times the parameters)"
    )


def _describe_target(law, loss: float, counts: set[int]) -> str:
    from parscale.law_figures import short
    from parscale.text import table

    if loss <= law.E:
        return f"loss {loss:g}: no size reaches it, E is {law.E:.4g}"
    rows = [["P", "N", "FLOPs per decoded token", "GB of parameters"]]
    for streams in sorted(counts):
        size = float(law.params_for(loss, streams))
        rows.append([streams, short(size)])
        rows[-1] += [f"{2 * size * streams:.3g}", f"{BYTES * size / 1e9:.3g}"]
    return f"loss {loss:g} is reached by\n{table(rows, indent=4)}"


def _read(data: str) -> dict:
    from parscale import law_points

    if not data:
        raise InputError(f"--data is missing: expected {DATA_HELP}")
    return law_points.read_points(PUBLISHED if data == "published" else data)


def _laws(options: flags.FlagValues) -> dict:
    """The laws that `predict` takes, by corpus."""
    from parscale import scaling_law
    from parscale.law_forms import Law

    if options.law is not None:
        text = ",".join(options.law)
        try:
            E, A, alpha, k = map(float, options.law)
        except ValueError:
            raise InputError(f"--law={text}: expected four numbers E,A,alpha,k") from None
        law = Law(E, A, alpha, (k,))
        if min(E, A, alpha) <= 0 or not all(map(math.isfinite, law.values)):
            raise InputError(f"--law={text}: expected numbers, E, A and alpha above 0")
        return {"given": law}
    data = _read(options.data)
    if options.corpus and options.corpus not in data:
        guess = nearest(options.corpus, data)
        raise InputError(f"--corpus={options.corpus}: expected one of {', '.join(data)}{guess}")
    chosen = [options.corpus] if options.corpus else list(data)
    return {name: _named(name, scaling_law.fit, data[name]).law for name in chosen}


def _named(corpus: str, call, *args):
    """The result of a call; an InputError of it is told with the corpus."""
    try:
        return call(*args)
    except InputError as error:
        raise InputError(f"{corpus}: {error}") from None


COMMANDS = {
    "sweep": (sweep, SWEEP),
    "fit": (fit, FIT),
    "plot": (plot, PLOT),
    "compare": (compare, COMPARE),
    "predict": (predict, PREDICT),
}

if __name__ == "__main__":
    program.run_commands(COMMANDS, __doc__)
