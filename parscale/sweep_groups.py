"""The groups of a sweep beside one of them: runs that differ in their seed alone, paired by it."""

import csv
import math
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parscale.law_points import paired
from sharding.settings import InputError, nearest

SEED = re.compile(r"-s\d+$")
COLUMNS = ("run", "seed", "params", "streams", "flops", "loss")


class Group(NamedTuple):
    """Runs of one name but for the seed.

    Attributes:
      params: N, without embeddings.
      streams: P.
      flops: of training one run.
      losses: by seed; NaN of a run that diverged.
    """

    params: int
    streams: int
    flops: float
    losses: dict[int, float]


def read_groups(path: str | Path) -> dict[str, Group]:
    """The groups of a sweep's table by name, in its order.

    Raises:
      InputError: no such file, or a table without the columns of a sweep.
    """
    groups: dict[str, Group] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                raise InputError(
                    f"{path}: missing column {', '.join(missing)}; expected the table of a sweep"
                )
            for row in reader:
                try:
                    group = Group(int(row["params"]), int(row["streams"]), float(row["flops"]), {})
                    name = SEED.sub("", row["run"])
                    losses = groups.setdefault(name, group).losses
                    losses[int(row["seed"])] = float(row["loss"])
                except (TypeError, ValueError) as error:
                    raise InputError(f"{path} line {reader.line_num}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; expected the table of a sweep") from None
    if not groups:
        raise InputError(f"{path}: no runs; expected a row for each below the header")
    return groups


def compare(groups: dict[str, Group], baseline: str) -> list[list[str]]:
    """A table of all groups beside one: names of columns, then a row for each.

    Raises:
      InputError: no group of that name.
    """
    if baseline not in groups:
        guess = nearest(baseline, groups)
        raise InputError(f"baseline {baseline}: expected one of {', '.join(groups)}{guess}")
    base = groups[baseline]
    rows = [["group", "P", "N", "FLOPs", "seeds", "loss", f"less {baseline}", "95 % interval"]]
    for name, group in groups.items():
        losses = list(group.losses.values())
        row = [name, group.streams, group.params, f"{group.flops / base.flops:.2f} x", len(losses)]
        row.append(f"{np.mean(losses):.4f}")
        if name == baseline or not group.losses.keys() & base.losses.keys():
            row += ["", ""]
        else:
            found = paired(group.losses, base.losses)
            row.append(f"{found.mean:+.4f}")
            row.append("" if math.isnan(found.low) else f"{found.low:+.4f} to {found.high:+.4f}")
        rows.append([str(cell) for cell in row])
    return rows
