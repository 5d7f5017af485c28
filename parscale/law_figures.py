"""Pictures of runs and of the scaling law fitted to them: loss against N, and against ln P."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from parscale.law_forms import Law
from parscale.law_points import Cell, Points, cells, sizes
from sharding.settings import InputError

SUFFIXES = (".png", ".svg")
# Okabe and Ito's colours, which colour-blind people tell apart; markers tell the same again.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dvp*"
STYLE = {
    "font.size": 12,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "parscale",  # the same figure gives the same file
}


def check_path(path: str) -> None:
    """Raises InputError unless a figure can be written to this path, by its suffix and place."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise InputError(f"{path}: expected a figure that ends in {' or '.join(SUFFIXES)}")
    try:
        open(path, "ab").close()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None


def write_law_figure(path: str, runs: Mapping[str, tuple[Points, Law | None]]) -> None:
    """Writes `law_figure(runs)` to a .png or .svg file.

    Raises:
      InputError: another suffix, or a place that cannot be written.
    """
    check_path(path)
    with matplotlib.rc_context(STYLE):
        figure = law_figure(runs)
        # No date: the same figure gives the same file.
        metadata = {"Date": None} if path.lower().endswith(".svg") else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def law_figure(runs: Mapping[str, tuple[Points, Law | None]]) -> Figure:
    """For each corpus, loss against N with a curve for each P, and against ln P for each size.

    Points are means over seeds; where there are several, a bar is one standard deviation to each
    side. Curves are the law's; without a law, lines join the means.

    Args:
      runs: by corpus, its points and the law fitted to them, or None.
    """
    figure = Figure(figsize=(12, 4.8 * len(runs)), layout="constrained")
    rows = figure.subplots(len(runs), 2, squeeze=False)
    for (left, right), (corpus, (points, law)) in zip(rows, runs.items(), strict=True):
        _against_params(left, points, law)
        _against_streams(right, points, law)
        several = any(cell.seeds > 1 for cell in cells(points))
        for axes in (left, right):
            axes.set_title(f"{corpus}, bars: deviation over seeds" if several else corpus)
            axes.set_ylabel("loss, nats per token")
    return figure


def _against_params(axes: Axes, points: Points, law: Law | None) -> None:
    found = cells(points)
    grid = np.geomspace(0.95 * points.params.min(), 1.05 * points.params.max(), 200)
    for place, streams in enumerate(np.unique(points.streams)):
        colour = COLOURS[place % len(COLOURS)]
        chosen = [cell for cell in found if cell.streams == streams]
        params = [cell.params for cell in chosen]
        _draw_cells(axes, params, chosen, colour, place, f"P = {streams}", law)
        if law is not None:
            axes.plot(grid, law.loss(grid, streams), color=colour)
    axes.set_xscale("log")
    bases = np.unique(sizes(points))
    _ticks(axes, bases, [short(base) for base in bases])
    axes.tick_params("x", rotation=45)  # sizes may be close to each other
    axes.set_xlabel("N, parameters without embeddings")
    axes.legend()


def _against_streams(axes: Axes, points: Points, law: Law | None) -> None:
    found, size = cells(points), sizes(points)
    known = np.unique(points.streams)
    for place, base in enumerate(np.unique(size)):
        colour = matplotlib.colormaps["viridis"](0.9 * place / max(len(np.unique(size)) - 1, 1))
        members = set(points.params[size == base])
        chosen = [cell for cell in found if cell.params in members]
        streams = [cell.streams for cell in chosen]
        _draw_cells(axes, streams, chosen, colour, place, f"N = {short(base)}", law)
        if law is not None:
            grid = np.geomspace(min(streams), max(streams), 200)
            params = np.interp(grid, streams, [cell.params for cell in chosen])
            axes.plot(grid, law.loss(params, grid), color=colour)
    axes.set_xscale("log")
    _ticks(axes, known, [str(streams) for streams in known])
    axes.set_xlabel("P, streams, on a scale of ln P")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _draw_cells(
    axes: Axes, x: list, chosen: list[Cell], colour, place: int, label: str, law: Law | None
) -> None:
    several = any(cell.seeds > 1 for cell in chosen)
    axes.errorbar(
        x,
        [cell.mean for cell in chosen],
        yerr=[cell.deviation for cell in chosen] if several else None,
        color=colour,
        marker=MARKERS[place % len(MARKERS)],
        linestyle="--" if law is None else "none",
        capsize=3,
        label=label,
    )


def _ticks(axes: Axes, places: np.ndarray, labels: list[str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(places))
    axes.set_xticks(places, labels)
    axes.xaxis.set_minor_locator(NullLocator())


def short(count: float) -> str:
    """A number of parameters in three digits, such as 536M."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{letter}"
    return f"{count:.3g}"
