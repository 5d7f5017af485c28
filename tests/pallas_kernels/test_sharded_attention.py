"""Attention over 8 devices: rows, streams and heads, each device on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as Spec

from pallas_kernels import attention, masks, sharded_attention
from pallas_kernels.masks.examples import documents

B, P, T, H, K, M, h = 4, 2, 130, 4, 2, 3, 16
HEADS = Spec("data", "stream", None, "tensor", None)
MOVES = ("all-gather", "all-to-all", "collective-permute", "all-reduce")


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 2, 2), ("data", "stream", "tensor"), (AxisType.Auto,) * 3)


@pytest.fixture(scope="module")
def arrays():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = [(B, P, T, H, h), *[(B, P, T, K, h)] * 2, *[(P, K, M, h)] * 2]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def masks_of():
    rows = masks.packed(documents(B, T))
    return [rows, masks.causal(), masks.sliding_window(T, 20), masks.Mask(rows.intervals[:1])]


@pytest.mark.parametrize("kind", range(4))
def test_equals_attention_on_whole_arrays(mesh, arrays, kind):
    """With gradients; that of the prefix is summed over the rows of all devices."""
    mask = masks_of()[kind]

    def value(op, q, k, v, *prefix):
        out, lse = op(q, k, v, mask, prefix=prefix, return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    def sharded(*args, **options):
        return sharded_attention(*args, q_spec=HEADS, kv_spec=HEADS, mesh=mesh, **options)

    grads = [
        jax.jit(jax.grad(lambda *x, op=op: value(op, *x), (0, 1, 2, 3, 4)))(*arrays)
        for op in (attention, sharded)
    ]
    for one, other in zip(*grads, strict=True):
        assert np.sqrt(np.mean((one - other) ** 2)) < 1e-6 * np.sqrt(np.mean(one**2))


def test_nothing_moves_between_devices(mesh, arrays):
    q, k, v, *_ = arrays
    place = lambda x: jax.device_put(x, jax.NamedSharding(mesh, HEADS))
    function = jax.jit(
        lambda q, k, v: sharded_attention(
            q, k, v, masks.causal(), q_spec=HEADS, kv_spec=HEADS, mesh=mesh
        )
    )
    text = function.lower(place(q), place(k), place(v)).compile().as_text()
    assert not any(word in text for word in MOVES)


def test_bad_specs_are_refused(mesh, arrays):
    q, k, v, *_ = arrays
    sequence = Spec("data", None, "stream", None, None)
    with pytest.raises(ValueError, match=r"q_spec=.*expected 5 entries"):
        sharded_attention(q, k, v, masks.causal(), q_spec=sequence, kv_spec=HEADS, mesh=mesh)
    rows = masks.packed(jnp.ones((2, T), int))
    with pytest.raises(ValueError, match=r"mask intervals \(2, 1, 2, 130\)"):
        sharded_attention(q, k, v, rows, q_spec=HEADS, kv_spec=HEADS, mesh=mesh)
    whole = Spec("data", "stream", None, None, None)
    with pytest.raises(ValueError, match="keys of another"):
        sharded_attention(q, k, v, masks.causal(), q_spec=HEADS, kv_spec=whole, mesh=mesh)
