"""The runs that a scaling law is fitted to: reading them, and what they show without a law."""

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import special

from sharding.settings import InputError, nearest

COLUMNS = ("corpus", "params", "streams", "loss")


@dataclasses.dataclass(frozen=True, eq=False)
class Points:
    """Runs on one corpus, a run in each place of four arrays of one length.

    Attributes:
      params: N, parameters without embeddings, prefix and aggregation included; float64.
      streams: P; int64.
      loss: final loss in nats per token; float64.
      seed: int64; 0 where the data name none.
    """

    params: np.ndarray
    streams: np.ndarray
    loss: np.ndarray
    seed: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, chosen: np.ndarray) -> "Points":
        """The runs at which the boolean array `chosen` is true."""
        columns = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Points(*(column[chosen] for column in columns))


class Cell(NamedTuple):
    """The runs of one N and P: mean and standard deviation (0 of a single one) over seeds."""

    params: float
    streams: int
    mean: float
    deviation: float
    seeds: int


class PairedEffect(NamedTuple):
    """What P streams change in the loss of one size: mean and interval of the difference to P = 1.

    `params` is the N of the model with P = 1; `low` and `high` are NaN for a single seed.
    """

    params: float
    streams: int
    mean: float
    low: float
    high: float
    seeds: int


class PairedLosses(NamedTuple):
    """Mean of paired differences and its 95 % Student t interval (NaN for a single pair)."""

    mean: float
    low: float
    high: float
    seeds: int


def read_points(path: str | Path) -> dict[str, Points]:
    """The points of a CSV file by corpus, in the order of the file.

    A row is a run. The columns `corpus`, `params`, `streams`, `loss` must be there, in any order;
    `seed` may be; others are ignored.

    Raises:
      InputError: no such file, missing columns, or a row that cannot be: named by its line.
    """
    rows: dict[str, list[tuple]] = {}
    seen: dict[tuple, int] = {}
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            _check_header(path, reader.fieldnames)
            for row in reader:
                where = f"{path} line {reader.line_num}"
                if None in row:
                    width = len(reader.fieldnames)
                    raise InputError(
                        f"{where}: {width + len(row[None])} cells; expected {width}, as in the "
                        "header"
                    )
                corpus = (row["corpus"] or "").strip()
                if not corpus:
                    raise InputError(f"{where}: corpus is empty; expected its name")
                streams, seed = _whole(row, "streams", where), 0
                if "seed" in row:
                    seed = _whole(row, "seed", where, least=0)
                run = (_positive(row, "params", where), streams, _positive(row, "loss", where))
                key = (corpus, run[0], streams, seed)
                if key in seen:
                    raise InputError(
                        f"{where}: same corpus, params, streams and seed as line {seen[key]}; "
                        "expected a column `seed` that tells them apart"
                    )
                seen[key] = reader.line_num
                rows.setdefault(corpus, []).append((*run, seed))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV file in UTF-8: {error}") from None
    if not rows:
        raise InputError(f"{path}: no runs; expected a row for each below the header")
    kinds = (np.float64, np.int64, np.float64, np.int64)
    return {
        corpus: Points(
            *(np.array(c, kind) for c, kind in zip(zip(*runs, strict=True), kinds, strict=True))
        )
        for corpus, runs in rows.items()
    }


def _check_header(path: str | Path, found: list[str] | None) -> None:
    found = found or []
    missing = [name for name in COLUMNS if name not in found]
    if missing:
        guess = nearest(missing[0], found)
        raise InputError(
            f"{path}: missing column{'s' * (len(missing) > 1)} {', '.join(missing)}; expected "
            f"{', '.join(COLUMNS)}, found {', '.join(found) or 'none'}{guess}"
        )


def _positive(row: dict, name: str, where: str) -> float:
    text = (row[name] or "").strip()
    try:
        value = float(text)
    except ValueError:
        raise InputError(f"{where}: {name}={text!r}: expected a number") from None
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{where}: {name}={text}: expected a number above 0")
    return value


def _whole(row: dict, name: str, where: str, least: int = 1) -> int:
    text = (row[name] or "").strip()
    try:
        value = int(text)
    except ValueError:
        raise InputError(f"{where}: {name}={text!r}: expected a whole number") from None
    if value < least:
        raise InputError(f"{where}: {name}={value}: expected at least {least}")
    return value


def cells(points: Points) -> list[Cell]:
    """Mean and spread over seeds of each pair of N and P, by P, then by N."""
    found = []
    for streams, params in sorted(set(zip(points.streams, points.params, strict=True))):
        loss = points.loss[(points.streams == streams) & (points.params == params)]
        spread = loss.std(ddof=1) if len(loss) > 1 else 0.0
        found.append(
            Cell(float(params), int(streams), float(loss.mean()), float(spread), len(loss))
        )
    return found


def sizes(points: Points) -> np.ndarray:
    """Which runs are of one model size, though prefixes and aggregation raise N with P.

    A model belongs to the nearest N below its own among those with fewer streams, unless a smaller
    model of its own P does; it is then a size of its own.

    Returns:
      [n] float64: the N of each run's size at the fewest streams it has.
    """
    bases: list[float] = []
    result = np.zeros(len(points))
    for streams in np.unique(points.streams):
        taken = set()
        for params in np.unique(points.params[points.streams == streams]):
            base = max((b for b in bases if b <= params), default=params)
            base = params if base in taken else base
            taken.add(base)
            result[(points.streams == streams) & (points.params == params)] = base
        bases += [base for base in taken if base not in bases]
    return result


def paired_effect(points: Points) -> list[PairedEffect]:
    """Differences in loss to P = 1 at each size, seed by seed: mean and 95 % Student t interval.

    Pairs share size and seed, so that what a seed does to both drops out. A size without a run at
    P = 1, or a seed that only one of the two has, does not count. By size, then by P.
    """
    size = sizes(points)
    found = []
    for base in np.unique(size):
        alone = _by_seed(points.where((size == base) & (points.streams == 1)))
        for streams in np.unique(points.streams[(size == base) & (points.streams > 1)]):
            several = _by_seed(points.where((size == base) & (points.streams == streams)))
            both = sorted(alone.keys() & several.keys())
            if not both:
                continue
            found.append(PairedEffect(float(base), int(streams), *paired(several, alone)))
    return found


def paired(losses: Mapping[int, float], others: Mapping[int, float]) -> PairedLosses:
    """Differences of losses by seed to others, over the seeds of both (at least one)."""
    seeds = sorted(losses.keys() & others.keys())
    change = np.array([losses[seed] - others[seed] for seed in seeds])
    half = math.nan
    if len(seeds) > 1:
        quantile = special.stdtrit(len(seeds) - 1, 0.975)
        half = float(quantile * change.std(ddof=1) / math.sqrt(len(seeds)))
    mean = float(change.mean())
    return PairedLosses(mean, mean - half, mean + half, len(seeds))


def _by_seed(points: Points) -> dict[int, float]:
    return dict(zip(points.seed.tolist(), points.loss.tolist(), strict=True))
