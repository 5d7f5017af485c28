"""Everything a fit of the scaling law has to say of one corpus: as plain data, and as tables."""

from collections.abc import Sequence
from typing import Any

from parscale import law_points, scaling_law
from parscale.law_figures import short
from parscale.law_forms import LOG, RIVALS, Law, free_form
from parscale.law_points import Points
from parscale.scaling_law import LeftOut
from parscale.text import table


def study(
    points: Points, published: Sequence[float] | None = None, draws: int = 1000
) -> tuple[dict[str, Any], Law]:
    """Fits the law and its rivals, with intervals, multipliers and left-out predictions.

    Args:
      points: of the corpus.
      published: E, A, alpha, k and R2 to print beside ours, or None.
      draws: of the bootstrap.

    Returns:
      the figures as plain data, and the fitted law.

    Raises:
      InputError: the points are too few.
    """
    rivals = {form.name: scaling_law.fit(points, form) for form in RIVALS}
    ours = rivals[LOG.name]
    streams = sorted(set(points.streams.tolist()) - {1})
    samples = scaling_law.bootstrap(points, ours.law, draws)
    free = scaling_law.fit(points, free_form(points.streams))
    free_samples = scaling_law.bootstrap(points, free.law, draws)
    multipliers = {}
    for name, law, drawn in (("law", ours.law, samples), ("free", free.law, free_samples)):
        spread = scaling_law.multiplier_samples(law.form, drawn, streams)
        multipliers[name] = _with_intervals(streams, law.multiplier(streams), spread)
    theirs = None
    if published:
        law = Law(*published[:3], (published[3],))
        theirs = {
            "parameters": dict(zip(law.form.names, published[:4], strict=True)),
            "r2": published[4],
            "objective": scaling_law.objective(law, points),
        }
    figures = {
        "points": len(points),
        "parameters": _with_intervals(ours.law.form.names, ours.law.values, samples),
        "not_identified": scaling_law.not_identified(samples),
        "r2": ours.r2,
        "objective": ours.objective,
        "published": theirs,
        "multipliers": multipliers,
        "left_out": {
            by: [_left_out(left) for left in scaling_law.leave_one_out(points, by, ours.law)]
            for by in ("streams", "params")
        },
        "rivals": {
            name: {
                "formula": rival.law.form.formula,
                "parameters": dict(zip(rival.law.form.names, rival.law.values, strict=True)),
                "objective": rival.objective,
                "r2": rival.r2,
            }
            for name, rival in rivals.items()
        },
        "cells": [cell._asdict() for cell in law_points.cells(points)],
        "paired_effect": [effect._asdict() for effect in law_points.paired_effect(points)],
    }
    return figures, ours.law


def _with_intervals(names, values, samples) -> dict[Any, dict[str, float]]:
    low, high = scaling_law.interval(samples).tolist()
    keys = ("value", "low", "high")
    columns = zip(names, zip(map(float, values), low, high, strict=True), strict=True)
    return {name: dict(zip(keys, column, strict=True)) for name, column in columns}


def _left_out(left: LeftOut) -> dict[str, Any]:
    if left.law is None:
        return {"value": left.value, "parameters": None}
    return {
        "value": left.value,
        "parameters": dict(zip(left.law.form.names, left.law.values, strict=True)),
        "mean_error": float(left.errors.mean()),
        "largest_error": float(max(left.errors, key=abs)),
    }


def describe(figures: dict[str, Any]) -> str:
    """The figures of `study` as tables."""
    parts = [
        f"{figures['points']} points; L = (A / (N m(P)))^alpha + E, by the least sum of Huber "
        "losses (delta 0.001) in ln L",
        _describe_parameters(figures),
        _describe_identified(figures),
        "What P streams are worth: times the parameters, with 95 % intervals\n"
        + _describe_multipliers(figures["multipliers"]),
        "Left out of the fit, then predicted: error is predicted less observed loss\n"
        + _describe_left_out(figures["left_out"]),
        "Rival forms of m(P)\n" + _describe_rivals(figures["rivals"]),
    ]
    if any(cell["seeds"] > 1 for cell in figures["cells"]):
        parts.append("Over seeds\n" + _describe_cells(figures["cells"]))
    if any(effect["seeds"] > 1 for effect in figures["paired_effect"]):
        parts.append(
            "Loss with P streams less loss with one, same size and seed, with 95 % t intervals\n"
            + _describe_effects(figures["paired_effect"])
        )
    return "\n\n".join(parts)


def _describe_parameters(figures) -> str:
    published = figures["published"]
    rows = [["", "ours", "95 % interval", *(["published"] if published else [])]]
    for name, row in figures["parameters"].items():
        rows.append([name, _digits(row["value"]), _range(row)])
        if published:
            rows[-1].append(_digits(published["parameters"][name]))
    for name, label, digits in (("r2", "R2", ".4f"), ("objective", "Huber sum", ".8g")):
        rows.append([label, f"{figures[name]:{digits}}", ""])
        if published:
            rows[-1].append(f"{published[name]:{digits}}")
    text = table(rows)
    if published:
        text += "\n(published Huber sum: ours, at the published parameters)"
    return text + "\n(intervals: residual bootstrap)"


def _describe_identified(figures) -> str:
    k = figures["parameters"]["k"]
    lines = []
    if figures["not_identified"]:
        names = figures["not_identified"]
        lines.append(
            f"NOT IDENTIFIED by these points: {', '.join(names)}, whose 95 % interval"
            f"{'s span' if len(names) > 1 else ' spans'} a factor of 10 or more. What P streams "
            "are worth may be known all the same: see below, free of the logarithm."
        )
    if k["low"] <= 0 <= k["high"]:
        lines.append("The interval of k contains 0: these points show no effect of P either way.")
    elif k["high"] < 0:
        lines.append("k is negative: on these points streams do harm.")
    return "\n".join(lines) or "All four parameters are identified, within their intervals."


def _describe_multipliers(multipliers) -> str:
    rows = [["P", "k ln P + 1", "", "free for each P", ""]]
    for streams, row in multipliers["law"].items():
        free = multipliers["free"][streams]
        rows.append([streams, f"{row['value']:.3f}", _range(row), f"{free['value']:.3f}"])
        rows[-1].append(_range(free))
    return table(rows)


def _describe_left_out(left_out) -> str:
    rows = [["without", "E", "A", "alpha", "k", "mean error", "largest error"]]
    for by, label, shown in (("streams", "P", "{:g}".format), ("params", "N", short)):
        for row in left_out[by]:
            rows.append([f"{label} = {shown(row['value'])}"])
            if row["parameters"] is None:
                rows[-1] += [""] * 5 + ["the rest is too little for a fit"]
                continue
            rows[-1] += [_digits(value) for value in row["parameters"].values()]
            rows[-1] += [f"{row['mean_error']:+.5f}", f"{row['largest_error']:+.5f}"]
    return table(rows)


def _describe_rivals(rivals) -> str:
    rows = [["form", "m(P)", "E", "A", "alpha", "its own", "Huber sum", "R2"]]
    for name, row in rivals.items():
        common, own = list(row["parameters"].items())[:3], list(row["parameters"].items())[3:]
        rows.append([name, row["formula"], *(_digits(value) for _, value in common)])
        rows[-1].append(", ".join(f"{key} {_digits(value)}" for key, value in own))
        rows[-1] += [f"{row['objective']:.3e}", f"{row['r2']:.4f}"]
    return table(rows)


def _describe_cells(found) -> str:
    rows = [["P", "N", "mean loss", "standard deviation", "seeds"]]
    for cell in found:
        rows.append([cell["streams"], short(cell["params"]), f"{cell['mean']:.4f}"])
        rows[-1] += [f"{cell['deviation']:.4f}" if cell["seeds"] > 1 else "", cell["seeds"]]
    return table(rows)


def _describe_effects(effects) -> str:
    rows = [["N at P = 1", "P", "mean", "95 % interval", "seeds"]]
    for row in effects:
        known = f"{row['low']:+.4f} to {row['high']:+.4f}" if row["seeds"] > 1 else "one seed only"
        rows.append([short(row["params"]), row["streams"], f"{row['mean']:+.4f}", known])
        rows[-1].append(row["seeds"])
    return table(rows)


def _digits(value: float) -> str:
    return f"{value:.4g}" if abs(value) >= 1e4 or abs(value) < 1e-3 else f"{value:.4f}"


def _range(row) -> str:
    return f"{_digits(row['low'])} to {_digits(row['high'])}"
