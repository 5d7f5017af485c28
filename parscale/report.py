"""What a run or a sweep came to, as sections of a page: losses, law, streams, cost."""

import csv
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from models.config import ModelConfig
from parscale import (
    config_io,
    cost,
    data,
    evaluation,
    law_figures,
    law_points,
    page,
    scaling_law,
    workdir,
)
from parscale.chips import Chip
from parscale.config import Config
from parscale.metrics import read_csv
from parscale.progress import format_seconds
from parscale.sweep import TABLE
from sharding.settings import InputError

Section = tuple[str, list[str]]
STREAMS = (1, 2, 4, 8)  # of the table of costs
PROMPT, OUTPUT = 128, 128
ROWS = 128  # held-out rows behind the figures of the streams


def sections(folder: str | Path, chip: Chip) -> list[Section]:
    """The report of a sweep's folder, or of a run's workdir; the cost of decoding is on `chip`.

    Raises:
      InputError: the folder is neither.
    """
    folder = Path(folder)
    if (folder / TABLE).exists():
        return sweep_sections(folder, chip)
    if not workdir.is_run(folder):
        raise InputError(
            f"{folder}: expected the folder of a sweep ({TABLE}) or of a run "
            f"({workdir.CONFIG} and {workdir.CHECKPOINTS}/)"
        )
    return run_sections(folder, chip)


def run_sections(folder: Path, chip: Chip) -> list[Section]:
    """The report of one run."""
    config = config_io.from_json(Config, folder / workdir.CONFIG)
    return [
        ("Result", result_blocks(folder, config)),
        ("Loss", [page.figure(lambda: run_figure(folder), "Loss of each step, and held out")]),
        ("Streams", stream_blocks({folder.name: folder})),
        ("Cost of decoding", cost_blocks(config.model, chip)),
    ]


def sweep_sections(folder: Path, chip: Chip) -> list[Section]:
    """The report of a sweep."""
    with (folder / TABLE).open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise InputError(f"{folder / TABLE}: no run is finished yet")
    first = {}
    for row in rows:
        first.setdefault((row["width"], row["streams"]), folder / row["run"])
    several = {str(path.name): path for (_, streams), path in first.items() if streams != "1"}
    largest = max(rows, key=lambda row: float(row["params"]))
    model = config_io.from_json(Config, folder / largest["run"] / workdir.CONFIG).model
    return [
        ("Runs", runs_blocks(rows)),
        ("Loss while training", [sweep_curves(folder, rows)]),
        ("Parallel scaling law", law_blocks(folder / TABLE)),
        ("Streams", stream_blocks(several)),
        ("Cost of decoding", cost_blocks(model, chip)),
    ]


def result_blocks(folder: Path, config: Config) -> list[str]:
    """The figures of `result.json`, or how far the run is."""
    path = folder / workdir.RESULT
    if not path.exists():
        steps = read_csv(folder)["step"]
        done = steps[-1] if steps else 0
        return [page.text(f"The run has done {done} of {config.train.steps} steps.", "warning")]
    result = json.loads(path.read_text())
    rows = [
        ["held-out loss, nats per token", f"{result['held_out_loss']:.4f}"],
        ["bits per byte", f"{result['bits_per_byte']:.4f}"],
        *([f"{name} model", f"{bits:.4f}"] for name, bits in result["ngram_bits_per_byte"].items()),
        ["N, parameters without embeddings", f"{result['non_embedding_parameters']:,}"],
        ["P, streams", result["streams"]],
        ["tokens", f"{result['tokens']:,}"],
        ["training", format_seconds(result["seconds"])],
        ["FLOPs", f"{result['flops']:.3g}"],
        ["device", f"{result['device']} ({result['host']})"],
        ["corpus", f"{config.data.corpus}, SHA-256 {result['corpus_sha256'][:12]}"],
        ["versions", ", ".join(f"{name} {v}" for name, v in result["versions"].items())],
    ]
    return [page.table(["", config.data.corpus], rows)]


def run_figure(folder: Path) -> Figure:
    """Loss of the steps and of held-out text against tokens."""
    metrics = read_csv(folder)
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    _curve(axes, metrics, "loss", color=law_figures.COLOURS[0], label="training", linewidth=1)
    _curve(
        axes, metrics, "held_out_loss", color=law_figures.COLOURS[1], label="held out", marker="o"
    )
    axes.set_xlabel("steps")
    axes.set_ylabel("loss, nats per token")
    axes.legend()
    return figure


def _curve(axes, metrics: dict[str, list], name: str, **style) -> None:
    known = [(x, y) for x, y in zip(metrics["step"], metrics[name], strict=True) if y is not None]
    if known:
        axes.plot(*zip(*known, strict=True), **style)


def runs_blocks(rows: Sequence[dict[str, str]]) -> list[str]:
    """The table of a sweep, a line for each size and number of streams."""
    cells: dict[tuple, list[float]] = {}
    for row in rows:
        key = int(row["width"]), int(row["streams"]), int(row["params"]), row["learning_rate"]
        cells.setdefault(key, []).append(float(row["loss"]))
    lines = []
    for (width, streams, params, rate), losses in sorted(cells.items()):
        deviation = f"{np.std(losses, ddof=1):.4f}" if len(losses) > 1 else ""
        lines.append([f"width {width}, P = {streams}", f"{params:,}", rate, len(losses)])
        lines[-1] += [f"{np.mean(losses):.4f}", deviation]
    header = ["", "N", "learning rate", "runs", "mean held-out loss", "standard deviation"]
    facts = {name: sorted({row[name] for row in rows}) for name in ("commit", "device", "steps")}
    said = "; ".join(f"{name} {', '.join(values)}" for name, values in facts.items())
    return [page.table(header, lines), page.text(f"{len(rows)} runs; {said}.", "note")]


def sweep_curves(folder: Path, rows: Sequence[dict[str, str]]) -> str:
    """Training loss of each width in a panel of its own: a curve for each P, the mean over runs."""
    widths = sorted({int(row["width"]) for row in rows})
    streams = sorted({int(row["streams"]) for row in rows})

    def draw() -> Figure:
        figure = Figure(figsize=(4.2 * len(widths), 4), layout="constrained")
        panels = figure.subplots(1, len(widths), squeeze=False, sharey=True)[0]
        for axes, width in zip(panels, widths, strict=True):
            for place, count in enumerate(streams):
                chosen = [
                    read_csv(_run_path(folder / row["run"]))
                    for row in rows
                    if (int(row["width"]), int(row["streams"])) == (width, count)
                ]
                if chosen:
                    length = min(len(metrics["step"]) for metrics in chosen)
                    known = np.array([metrics["loss"][:length] for metrics in chosen], float)
                    mean = known.mean(0)  # NaN, and no point, where a row has no loss
                    colour = law_figures.COLOURS[place % len(law_figures.COLOURS)]
                    steps = chosen[0]["step"][:length]
                    axes.plot(steps, mean, color=colour, label=f"P = {count}")
            axes.set_title(f"width {width}")
            axes.set_xlabel("steps")
            axes.set_yscale("log")
        panels[0].set_ylabel("training loss, nats per token")
        panels[-1].legend()
        return figure

    return page.figure(draw, "Loss of the training batches, mean over seeds")


def _run_path(folder: Path) -> Path:
    """Where a run of a sweep keeps its files: runs of streams alone have a folder for each P."""
    if (folder / workdir.CONFIG).exists():
        return folder
    return next(iter((folder / workdir.STREAMS).iterdir()))


def law_blocks(path: Path) -> list[str]:
    """The fitted law with what P is worth, and the figure; or why there is none."""
    try:
        corpora = law_points.read_points(path)
    except InputError as error:
        return [page.text(f"No law: {error}", "warning")]
    blocks, runs = [], {}
    for corpus, points in corpora.items():
        runs[corpus] = points, None
        try:
            found = scaling_law.fit(points)
        except InputError as error:
            blocks.append(page.text(f"{corpus}: no law is fitted: {error}", "warning"))
            continue
        runs[corpus] = points, found.law
        samples = scaling_law.bootstrap(points, found.law, 300)
        low, high = scaling_law.interval(samples)
        names = found.law.form.names
        lines = [
            [name, f"{value:.4g}", f"{a:.4g} to {b:.4g}"]
            for name, value, a, b in zip(names, found.law.values, low, high, strict=True)
        ]
        blocks.append(page.table([corpus, "value", "95 % interval"], lines))
        unknown = scaling_law.not_identified(samples)
        if unknown:
            blocks.append(
                page.text(f"Not identified by these points: {', '.join(unknown)}.", "warning")
            )
        counts = sorted(set(points.streams.tolist()) - {1})
        worth = zip(counts, np.atleast_1d(found.law.multiplier(np.array(counts))), strict=True)
        lines = [[f"P = {count}", f"{value:.3f}"] for count, value in worth]
        blocks.append(page.table(["", "times the parameters, by the law"], lines))
        lines = []
        for effect in law_points.paired_effect(points):
            name = f"N {law_figures.short(effect.params)}, P = {effect.streams}"
            known = f"{effect.low:+.4f} to {effect.high:+.4f}" if effect.seeds > 1 else ""
            lines.append([name, f"{effect.mean:+.4f}", known, effect.seeds])
        header = ["loss less that of P = 1, same seed", "mean", "95 % interval", "seeds"]
        blocks.append(page.table(header, lines))
    caption = "Loss against N for each P, and against ln P for each N"
    return [page.figure(lambda: law_figures.law_figure(runs), caption), *blocks]


def stream_blocks(runs: dict[str, Path]) -> list[str]:
    """What the streams of some runs do on held-out text."""
    lines, warnings, drawn = [], [], {}
    for name, folder in runs.items():
        weights = workdir.load_weights(folder)
        if weights.model.streams == 1:
            continue
        text = data.open_data(weights.data, weights.model.vocab_size)
        batches = data.held_out_batches(text, 16, ROWS)
        found = evaluation.report(weights.build(), batches, weights.loss_chunk)
        drawn[name] = found
        best, even = found.stream_losses.min(), np.log(found.streams)
        values = (found.weight_entropy, even, found.mean_agreement)
        lines.append([name, found.streams, f"{found.loss:.4f}", f"{best:.4f}"])
        lines[-1] += [f"{found.gain:+.4f}", *(f"{value:.3f}" for value in values)]
        if found.collapsed:
            warnings.append(page.text(f"{name}: the streams have collapsed into one.", "warning"))
    if not lines:
        return [page.text("One stream: nothing is mixed.")]
    header = [
        "run", "P", "loss of the mixture", "best stream alone", "gain", "entropy of weights",
        "of equal weights", "agreement",
    ]  # fmt: skip
    return [
        page.table(header, lines),
        page.text(f"On {ROWS} held-out rows; agreement is the share of equal predictions.", "note"),
        *warnings,
        page.figure(lambda: streams_figure(drawn), "Loss of each stream alone, and mean weight"),
    ]


def streams_figure(found: dict[str, Any]) -> Figure:
    """For each run the loss of each stream alone beside that of the mixture, and mean weights."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, report) in enumerate(found.items()):
        colour = law_figures.COLOURS[place % len(law_figures.COLOURS)]
        marker = law_figures.MARKERS[place % len(law_figures.MARKERS)]
        at = place + np.linspace(-0.3, 0.3, report.streams)
        left.plot(at, report.stream_losses, marker=marker, color=colour, linestyle="none")
        left.hlines(report.loss, place - 0.4, place + 0.4, color=colour)
        right.plot(at, report.weights, marker=marker, color=colour, linestyle="none", label=name)
    left.set_ylabel("loss (line: the mixture)")
    right.set_ylabel("mean weight")
    for axes in (left, right):
        axes.set_xticks(range(len(found)), found, rotation=45, ha="right")
    return figure


def cost_blocks(model: ModelConfig, chip: Chip) -> list[str]:
    """Memory and latency of decoding for several numbers of streams, by the cost model."""
    rows = []
    for streams in sorted({*STREAMS, model.streams}):
        shape = dataclasses.replace(model, streams=streams)
        found = cost.decode_cost(shape, chip, batch=1, prompt=PROMPT, output=OUTPUT)
        memory = found.memory
        parts = (memory.weights, memory.transform, memory.aggregation, memory.kv_cache)
        rows.append([f"P = {streams}", *(f"{part / 1e6:,.3f}" for part in parts)])
        rows[-1] += [f"{memory.total / 1e6:,.3f}", f"{found.prefill.total * 1e6:,.1f}"]
        rows[-1] += [f"{found.step * 1e6:,.1f}"]
    header = [
        "MB", "weights", "transform", "aggregation", "KV cache", "all, with activations",
        "prefill, us", "a step, us",
    ]  # fmt: skip
    words = (
        f"Predicted, not measured: a roofline for one {chip.name}, batch 1, {PROMPT} tokens of "
        f"prompt, {OUTPUT} of output, bfloat16; starting an operation is not counted."
    )
    return [page.table(header, rows), page.text(words, "note")]
