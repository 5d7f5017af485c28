"""Attention for TPU: the entry points by the contract of `pallas_kernels.flash.api`."""

import math

import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.flash import tpu_backward, tpu_forward, tpu_layout
from pallas_kernels.flash import tpu_common as common
from pallas_kernels.flash.tpu_layout import LANES, Layout

# Of a tile, by bytes of a number: rows (query positions of all heads of a group), and keys.
FORWARD_TILES = {2: (1024, 1024), 4: (512, 512)}
BACKWARD_TILES = {2: (512, 512), 4: (256, 512)}

DTYPES = ("bfloat16", "float32")


def forward(options, q, k, v, mask, prefix, blocks=None):
    """`blocks`: query positions and keys of a tile, for tests and measurements."""
    layout, kinds, arrays = _prepare(FORWARD_TILES, q, k, v, mask, prefix, blocks)
    out, lse = tpu_forward.forward(
        options, layout, common.visits(kinds), arrays, dispatch.interpret()
    )
    out = tpu_layout.unfold_queries(layout, out).astype(q.dtype)
    return out, tpu_layout.unfold_rows(layout, lse)


def backward(options, q, k, v, mask, prefix, out, lse, dout, dlse, blocks=None):
    """`blocks`: as for `forward`."""
    layout, kinds, arrays = _prepare(BACKWARD_TILES, q, k, v, mask, prefix, blocks)
    folded_q, folded_k, folded_v, runs, *folded_prefix = arrays
    sees = lse > -jnp.inf
    delta = jnp.sum(out.astype(jnp.float32) * dout.astype(jnp.float32), -1) - dlse
    delta = jnp.where(sees, delta, 0.0)
    # Probabilities of a query that sees nothing, and of padding, are then zero.
    lse = jnp.where(sees, lse * common.LOG2_E, -common.LOWEST)
    shared = (
        tpu_layout.fold_queries(layout, dout.astype(folded_q.dtype)),
        tpu_layout.fold_rows(layout, lse, -common.LOWEST),
        tpu_layout.fold_rows(layout, delta, 0.0),
        dispatch.interpret(),
    )
    dq = tpu_backward.query_gradients(options, layout, common.visits(kinds), arrays, *shared)
    runs = None if runs is None else runs.swapaxes(1, 2)
    dk, dv = tpu_backward.key_gradients(
        options,
        layout,
        common.visits(kinds, by_keys=True),
        (folded_q, folded_k, folded_v, runs),
        *shared,
    )
    dprefix = None
    if prefix is not None:
        parts = tpu_backward.prefix_gradients(options, layout, (folded_q, *folded_prefix), *shared)
        dprefix = tuple(
            part[:, :, : layout.M].astype(x.dtype) for part, x in zip(parts, prefix, strict=True)
        )
    return (
        tpu_layout.unfold_queries(layout, dq).astype(q.dtype),
        tpu_layout.unfold_keys(layout, dk).astype(k.dtype),
        tpu_layout.unfold_keys(layout, dv).astype(v.dtype),
        dprefix,
    )


def unfit(q) -> str:
    """Why these kernels cannot take `q`, by its dtype; "" if they can."""
    if q.dtype in DTYPES:
        return ""
    return f"q.dtype is {q.dtype}: 'pallas_tpu' expects bfloat16 or float32"


def _prepare(tiles, q, k, v, mask, prefix, blocks) -> tuple[Layout, object, tuple]:
    """The layout, the kinds of its tiles, and the folded arrays that all kernels read."""
    dtype = jnp.result_type(q, k, v)
    why = unfit(q.astype(dtype))
    if why:
        raise ValueError(why)
    sizes = blocks or block_sizes(tiles[dtype.itemsize], q.shape[2], k.shape[2], q.shape[4])
    layout, kinds = tpu_layout.make_layout(q, k, mask, prefix, *sizes)
    return (
        layout,
        kinds,
        (
            tpu_layout.fold_queries(layout, q.astype(dtype)),
            tpu_layout.fold_keys(layout, k.astype(dtype)),
            tpu_layout.fold_keys(layout, v.astype(dtype)),
            tpu_layout.fold_runs(layout, mask) if layout.R else None,
            *(tpu_layout.fold_prefix(layout, x, dtype) for x in prefix or ()),
            *((None, None) if prefix is None else ()),
        ),
    )


def block_sizes(most: tuple[int, int], T: int, S: int, G: int) -> tuple[int, int]:
    """Query positions and keys of a tile: equal shares of the sequence, in whole registers.

    Args:
      most: rows and keys of a tile.
    """
    rows, keys = most
    unit = max(16, LANES // math.gcd(G, LANES))
    return _share(T, rows // G, unit), _share(S, keys, LANES)


def _share(length: int, most: int, unit: int) -> int:
    """Size of the blocks, in whole units and `most` at most, that cut `length` evenly."""
    most = max(most // unit * unit, unit)
    return tpu_layout.round_up(-(-length // -(-length // most)), unit)
