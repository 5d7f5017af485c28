"""A picture of where streams cost less than parameters, over batch and prompt length."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from parscale.law_figures import STYLE, check_path

LEVELS = (0.0625, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32)
COLOURS = "PuOr"  # told apart by colour-blind people too


class Region(NamedTuple):
    """One comparison over batch and prompt length, both ascending.

    Attributes:
      ratios: float `[batches, prompts]`, cost added by parameters over cost added by streams.
      fits: bool `[batches, prompts]`, whether the model with streams fits the chip's memory.
    """

    ratios: np.ndarray
    fits: np.ndarray


def write_regions(
    path: str, batches: Sequence[int], prompts: Sequence[int], panels: Mapping[str, Region]
) -> None:
    """Writes `regions_figure` to a .png or .svg file.

    Raises:
      InputError: another suffix, or a place that cannot be written.
    """
    check_path(path)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = regions_figure(batches, prompts, panels)
        # No date: the same figure gives the same file.
        metadata = {"Date": None} if path.lower().endswith(".svg") else {}
        figure.savefig(path, dpi=150, metadata=metadata)


def regions_figure(
    batches: Sequence[int], prompts: Sequence[int], panels: Mapping[str, Region]
) -> Figure:
    """For each title, contours of its ratio: the heavy one, at 1, is where streams stop paying.

    Hatched is where the model with streams does not fit the chip's memory.
    """
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 4.8 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True, sharey=True).flat
    for place, (title, region) in zip(axes, panels.items(), strict=True):
        filled = _draw(place, np.asarray(batches), np.asarray(prompts), region)
        place.set_title(title)
        place.set_xlabel("prompt, tokens")
        place.set_ylabel("batch, rows")
    figure.supxlabel("hatched: the model with streams does not fit the chip's memory", fontsize=10)
    bar = figure.colorbar(filled, ax=figure.axes, ticks=np.log2(LEVELS), extend="both")
    bar.set_ticklabels([f"{level:g}" for level in LEVELS])
    bar.set_label("cost added by parameters / cost added by streams")
    return figure


def _draw(axes: Axes, batches: np.ndarray, prompts: np.ndarray, region: Region):
    logs = np.log2(region.ratios)
    ends = np.log2((LEVELS[0], LEVELS[-1]))
    levels = np.linspace(*ends, 4 * (len(LEVELS) - 1) + 1)
    norm = TwoSlopeNorm(0, *ends)
    # The scales come first: places of labels are sought on them.
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    filled = axes.contourf(
        prompts, batches, logs, levels=levels, cmap=COLOURS, norm=norm, extend="both"
    )
    drawn = [level for level in np.log2(LEVELS) if logs.min() < level < logs.max()]
    lines = axes.contour(
        prompts, batches, logs, levels=drawn, colors="black",
        linewidths=[2.5 if level == 0 else 0.6 for level in drawn],
    )  # fmt: skip
    axes.clabel(lines, fmt=lambda level: f"{2.0**level:g}", fontsize=10, inline_spacing=2)
    if not region.fits.all():
        axes.contourf(
            prompts, batches, ~region.fits, levels=[0.5, 1.5], colors="none", hatches=["//"]
        )
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    return filled
