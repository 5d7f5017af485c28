"""Attention for TPU: the entry points by the contract of `pallas_kernels.flash.api`."""

import math

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.flash import tpu_common as common
from pallas_kernels.flash import tpu_forward

ROWS = 512  # of a tile of queries, all heads of a group together
KEYS = 1024  # of a tile


def block_sizes(T: int, S: int, G: int, rows: int = ROWS, keys: int = KEYS) -> tuple[int, int]:
    """Query positions and keys of a tile: equal shares of the sequence in whole registers."""
    unit = max(16, common.LANES // math.gcd(G, common.LANES))
    target = max(rows // G, unit)
    block_q = common.round_up(-(-T // -(-T // target)), unit)
    block_k = common.round_up(-(-S // -(-S // keys)), common.LANES)
    return block_q, block_k


def forward(options, q, k, v, mask, prefix, blocks=None):
    """`blocks`: query positions and keys of a tile, for tests and measurements."""
    T, G, S = q.shape[2], q.shape[4], k.shape[2]
    block_q, block_k = blocks or block_sizes(T, S, G)
    layout, kinds = common.make_layout(q, k, mask, prefix, block_q, block_k)
    dtype = jnp.result_type(q, k, v)
    arrays = (
        common.fold_queries(layout, q.astype(dtype)),
        common.fold_keys(layout, k.astype(dtype)),
        common.fold_keys(layout, v.astype(dtype)),
        common.fold_runs(layout, mask) if layout.R else None,
        *(common.fold_prefix(layout, x, dtype) for x in prefix or ()),
    )
    if prefix is None:
        arrays = (*arrays, None, None)
    out, lse = tpu_forward.forward(
        options, layout, common.visits(kinds), arrays, dispatch.interpret()
    )
    out = common.unfold_queries(layout, out).astype(q.dtype)
    return out, common.unfold_rows(layout, lse)
