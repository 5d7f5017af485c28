"""A mask as a picture."""

from pathlib import Path

import numpy as np

from pallas_kernels.masks import blocks
from pallas_kernels.masks.mask import Mask

PIXELS = 512  # at most, a side
COLORS = ("#ffffff", "#9ecae1", "#2171b5")  # by kind: EMPTY, PARTIAL, FULL


def draw(
    mask: Mask, queries: int, keys: int, path: str | Path, *, block: int = 128, row: int = 0
) -> float:
    """Writes a PNG, queries downwards and keys to the right, and prints the live-block fraction.

    A sequence of up to 512 positions is drawn pair by pair, a longer one by blocks: white where
    a kernel does not go, dark where everything is visible, light between.

    Args:
      mask: who sees whom.
      queries, keys: T and S.
      path: of the PNG.
      block: positions of the blocks that are counted, as a kernel would skip them.
      row: which of the mask's rows, its leading axes taken as one.

    Returns:
      the share of blocks of this row that a kernel visits.
    """
    # Imported here: it takes longer than all the rest of this package.
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    if mask.intervals is not None:
        rows = mask.intervals.reshape(-1, *mask.intervals.shape[-3:])
        if not 0 <= row < len(rows):
            raise ValueError(f"row={row}: expected 0 to {len(rows) - 1}, the rows of the mask")
        mask = Mask(rows[row], mask.causal, mask.dilation, mask.queries)
    pixel = -(-max(queries, keys) // PIXELS)
    kinds = np.asarray(blocks.block_kinds(mask, queries, keys, pixel, pixel))
    live = blocks.live_fraction(mask, queries, keys, block)
    text = f"{live:.1%} of the blocks of {block} x {block} are live"
    figure = Figure(figsize=(5, 5.3), layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        kinds, ListedColormap(COLORS), vmin=0, vmax=2, extent=(0, keys, queries, 0),
        interpolation="nearest",
    )  # fmt: skip
    axes.set_xlabel("key")
    axes.set_ylabel("query")
    axes.set_title(text, fontsize=10)
    figure.savefig(path, dpi=150)
    print(text)
    return live
