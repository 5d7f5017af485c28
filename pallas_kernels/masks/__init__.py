"""Who may see whom: masks, their algebra, and what they leave of each block of scores."""

from pallas_kernels.masks.explicit import from_blocks, from_dense
from pallas_kernels.masks.kinds import (
    cached,
    causal_blockwise,
    dilated_window,
    first_keys,
    fork_join,
    global_and_window,
    left_padding,
    next_scale,
    packed,
    packed_block_causal,
    packed_prefix_lm,
    prefix_lm,
    same_document,
    shared_question,
    sliding_window,
    streams,
    tree,
)
from pallas_kernels.masks.mask import Mask, causal, dense, full, in_runs
from pallas_kernels.masks.picture import draw

__all__ = [
    "Mask",
    "cached",
    "causal",
    "causal_blockwise",
    "dense",
    "dilated_window",
    "draw",
    "first_keys",
    "fork_join",
    "from_blocks",
    "from_dense",
    "full",
    "global_and_window",
    "in_runs",
    "left_padding",
    "next_scale",
    "packed",
    "packed_block_causal",
    "packed_prefix_lm",
    "prefix_lm",
    "same_document",
    "shared_question",
    "sliding_window",
    "streams",
    "tree",
]
