"""A grid of runs as data, and training all of them: resumable, over several devices, one table.

    seeds = zipped(values("train.seed", 0, 1, 2, label="s"), values("data.seed", 0, 1, 2))
    Sweep(base, product(values("model.streams", 1, 2, label="P"), seeds))

Lists of points are added with `+`. Every run has a folder of its own under the sweep's, named after
its point, which is a workdir like any other.
"""

import csv
import dataclasses
import fnmatch
import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from parscale import config_io, flops, paths, run, workdir
from parscale.config import Config
from parscale.progress import format_seconds
from sharding.settings import InputError

TABLE = "runs.csv"
LOG = "log.txt"
COLUMNS = (
    "run", "corpus", "params", "streams", "loss", "bits_per_byte", "seed", "steps", "tokens",
    "flops", "seconds", "width", "layers", "learning_rate", "transform", "transform_init",
    "transform_std", "aggregation", "trainable", "begins_from", "commit", "corpus_sha256",
    "device", "jax",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep, or a part of its description.

    Attributes:
      name: of the run, unique in its sweep; parts are joined by "-".
      fields: values by dotted name of the configuration's fields.
      after: name of a run of the same sweep with whose weights this one begins, or "".
    """

    name: str
    fields: dict[str, Any]
    after: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Runs that differ from a common configuration.

    Attributes:
      base: what they have in common.
      points: where each differs, in the order in which they are begun.
    """

    base: Config
    points: Sequence[Point]

    def __post_init__(self):
        names = [point.name for point in self.points]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise InputError(f"two runs of the sweep have the name {', '.join(sorted(twice))}")
        for place, point in enumerate(self.points):
            if point.after and point.after not in names[:place]:
                raise InputError(
                    f"run {point.name} begins after {point.after!r}, which is no earlier run"
                )

    def only(self, pattern: str) -> list[Point]:
        """The runs whose names match a pattern such as `s0-*`, and those that they begin after.

        Raises:
          InputError: none does.
        """
        wanted = {point.name for point in self.points if fnmatch.fnmatchcase(point.name, pattern)}
        if not wanted:
            names = ", ".join(point.name for point in self.points[:3])
            raise InputError(f"no run of the sweep is named {pattern!r}; they are {names}, ...")
        for point in reversed(self.points):
            if point.name in wanted and point.after:
                wanted.add(point.after)
        return [point for point in self.points if point.name in wanted]

    def config(self, point: Point, folder: Path) -> Config:
        """The whole configuration of a run of the sweep in `folder`.

        Raises:
          InputError: it does not validate; the run is named.
        """
        fields = dict(point.fields)
        if point.after:
            fields["train.init_from"] = str(folder / point.after)
        try:
            return config_io.replace(self.base, fields)
        except InputError as error:
            raise InputError(f"run {point.name}: {error}") from None


def values(field: str, *choices: Any, label: str = "") -> list[Point]:
    """A point for each value of a field, named `<label><value>`, or not named without a label."""
    return [Point(f"{label}{choice}" if label else "", {field: choice}) for choice in choices]


def zipped(*lists: Sequence[Point]) -> list[Point]:
    """The first points of all lists as one, the second ones, and so on; of equal lengths."""
    return [_join(points) for points in zip(*lists, strict=True)]


def product(*lists: Sequence[Point]) -> list[Point]:
    """Every choice of a point from each list, as one; the last list varies fastest."""
    return [_join(points) for points in itertools.product(*lists)]


def _join(points: Sequence[Point]) -> Point:
    fields = {name: value for point in points for name, value in point.fields.items()}
    after = "".join(point.after for point in points)
    return Point("-".join(point.name for point in points if point.name), fields, after)


def run_sweep(
    sweep: Sweep,
    folder: str | Path,
    devices: Sequence[jax.Device],
    *,
    only: str = "*",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Trains every run of a sweep that is not finished, one at a time on each device.

    Finished runs are not run again, and begun ones go on from their last checkpoint. After each
    run `runs.csv` holds a row for every finished one.

    Args:
      sweep: the runs.
      folder: holds the table and a workdir for each run.
      devices: a thread for each takes the next run that can begin.
      only: pattern of the names of the runs to train.
      should_stop: asked after every step; runs then save and end early.
      report: takes the lines that tell what was done, and how long the rest will take.

    Returns:
      the rows of the table, in the sweep's order; fewer than runs if it was stopped early.

    Raises:
      InputError: a run's configuration, or what is in its folder, does not fit; or `only` names
        no run.
      DivergedError: some runs diverged; all others are finished but those that begin from them.
      SaveError: a run could not be saved; the others were, and stopped.
    """
    folder = Path(folder)
    paths.check_folder(folder)
    configs = {point.name: sweep.config(point, folder) for point in sweep.points}
    rows = {}
    for name, config in configs.items():
        result = finished(config, folder / name)
        if result is not None:
            rows[name] = row(name, config, result)
    waiting = [point for point in sweep.only(only) if point.name not in rows]
    work = _Work(waiting, configs, folder, rows, should_stop, report)
    if rows:
        report(f"{len(rows)} of {len(configs)} runs were finished before")
    threads = [threading.Thread(target=work.take_turns, args=[device]) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if work.error is not None:
        raise work.error
    if work.diverged and not should_stop():
        raise run.DivergedError("; ".join(f"run {n}: {e}" for n, e in work.diverged.items()))
    return write_table(folder, configs, rows)


def finished(config: Config, folder: Path) -> dict[str, Any] | None:
    """The result of a run in its folder, if it is there and is of this configuration.

    Raises:
      InputError: the folder holds a run of another configuration.
    """
    home = workdir.run_folder(folder, config)
    if not (home / workdir.CONFIG).exists():
        return None
    saved = config_io.from_json(Config, home / workdir.CONFIG)
    try:
        config_io.check_resumable(saved, config, grow=False)
    except InputError as error:
        raise InputError(f"{home}: {error}") from None
    path = home / workdir.RESULT
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and result["steps"] == config.train.steps else None


class _Work:
    """What the threads of a sweep share."""

    def __init__(self, waiting, configs, folder, rows, should_stop, report):
        self.configs, self.folder, self.rows = configs, folder, rows
        self.report, self._should_stop = report, should_stop
        self.error: Exception | None = None
        self.diverged: dict[str, str] = {}
        self._waiting = waiting
        self._changed = threading.Condition()
        self._start = time.monotonic()
        self._cost = {point.name: run_cost(configs[point.name]) for point in waiting}
        self._done_cost = 0.0

    def stopped(self) -> bool:
        return self.error is not None or self._should_stop()

    def take_turns(self, device: jax.Device) -> None:
        """Trains one waiting run after another until there is none."""
        while (point := self._next()) is not None:
            config, folder = self.configs[point.name], self.folder / point.name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with (folder / LOG).open("a") as log:
                    result = run.train(
                        config, folder, should_stop=self.stopped, devices=[device], log=log
                    )
            except run.DivergedError as error:
                self._diverge(point, str(error))
                continue
            except Exception as error:
                with self._changed:
                    self.error = self.error or type(error)(f"run {point.name}: {error}")
                    self._changed.notify_all()
                return
            if result is None:
                return
            self._finish(point, config, result)

    def _next(self) -> Point | None:
        """The next run whose predecessor is finished; waits for one; None at the end."""
        with self._changed:
            while self._waiting and not self.stopped():
                for point in list(self._waiting):
                    if point.after in self.diverged:
                        self._waiting.remove(point)
                        self.diverged[point.name] = f"not run, after {point.after}"
                        continue
                    if not point.after or point.after in self.rows:
                        self._waiting.remove(point)
                        return point
                self._changed.wait(timeout=0.5)
            return None

    def _diverge(self, point: Point, reason: str) -> None:
        with self._changed:
            self.diverged[point.name] = reason
            self.report(f"{point.name}: {reason}")
            self._changed.notify_all()

    def _finish(self, point: Point, config: Config, result: dict[str, Any]) -> None:
        with self._changed:
            self.rows[point.name] = row(point.name, config, result)
            write_table(self.folder, self.configs, self.rows)
            self._done_cost += self._cost[point.name]
            left = sum(cost for name, cost in self._cost.items() if name not in self.rows)
            eta = (time.monotonic() - self._start) / self._done_cost * left
            self.report(
                f"{len(self.rows)}/{len(self.configs)}  {point.name}  "
                f"loss {result['held_out_loss']:.4f}  {format_seconds(result['seconds'])}  "
                f"ETA {format_seconds(eta)}"
            )
            self._changed.notify_all()


def run_cost(config: Config) -> float:
    """Operations of a whole run, by which the time that is left is shared out."""
    step = flops.train_flops(config.model, config.data.length, config.data.batch)
    return float(step * config.train.steps)


def row(name: str, config: Config, result: dict[str, Any]) -> dict[str, Any]:
    """A finished run as a row of the table; `loss` is of held-out text, nats per token."""
    model, train = config.model, config.train
    values = {
        "run": name,
        "corpus": config.data.corpus,
        "params": result["non_embedding_parameters"],
        "streams": model.streams,
        "loss": result["held_out_loss"],
        "bits_per_byte": result["bits_per_byte"],
        "seed": train.seed,
        "steps": train.steps,
        "tokens": result["tokens"],
        "flops": result["flops"],
        "seconds": result["seconds"],
        "width": model.width,
        "layers": model.layers,
        "learning_rate": train.learning_rate,
        "transform": model.transform,
        "transform_init": model.transform_init,
        "transform_std": model.transform_std,
        "aggregation": model.aggregation,
        "trainable": train.trainable,
        "begins_from": Path(train.init_from).name,
        "commit": result["commit"],
        "corpus_sha256": result["corpus_sha256"],
        "device": result["device"],
        "jax": result["versions"]["jax"],
    }
    if model.streams == 1:
        values |= dict.fromkeys(("transform", "transform_init", "transform_std", "aggregation"), "")
    return values


def write_table(
    folder: Path, configs: dict[str, Config], rows: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Writes `runs.csv` in the sweep's order, whole or not at all. Returns its rows."""
    ordered = [rows[name] for name in configs if name in rows]
    partial = folder / f"{TABLE}.partial"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(ordered)
    os.replace(partial, folder / TABLE)
    return ordered
