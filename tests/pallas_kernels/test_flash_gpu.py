"""The Mosaic GPU kernels against the oracle: in an interpreter, and on a GPU where there is one.

The interpreter runs the copies, barriers and loops of a kernel in threads and looks for races
between them; it computes products of tiles as ordinary ones. That the instructions exist and fit
the registers is tested by compiling for an H200, which needs the CUDA plugin but no GPU.
"""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import static_gpu
from pallas_kernels import attention, dispatch, masks
from pallas_kernels.masks.examples import example

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
off_gpu = pytest.mark.skipif(jax.default_backend() == "gpu", reason="runs on the GPU instead")
with_plugin = pytest.mark.skipif(not static_gpu.installed(), reason=static_gpu.MISSING)


@pytest.fixture
def interpreter(monkeypatch):
    """Kernels run in the interpreter, and there must have been no race between their threads."""
    from jax._src import core
    from jax._src.pallas.mosaic.interpret import thread_map
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    compiled, lock = {}, threading.Lock()

    def run(jaxpr, consts, *args):
        with lock:
            if jaxpr not in compiled:
                traced = jax.jit(lambda *args: core.eval_jaxpr(jaxpr, *args) and None)
                compiled[jaxpr] = traced.trace(consts, *args).lower().compile()
        compiled[jaxpr](consts, *args)

    # The interpreter compiles the same program for each thread of each block of the grid.
    monkeypatch.setattr(thread_map, "_run_jaxpr", run)
    gpu_callbacks.reset_gpu_interpret_mode_state()
    with dispatch.interpreting(InterpretGPUParams(detect_races=True)):
        yield
        jax.effects_barrier()
    if compiled:
        assert not gpu_callbacks.get_races().races_found


def inputs(
    T, S=None, heads=1, kv_heads=1, head_dim=64, slots=0, rows=1, streams=1, dtype="bfloat16"
):
    S = S or T
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.standard_normal(shape), dtype)

    q = normal(rows, streams, T, heads, head_dim)
    k, v = (normal(rows, streams, S, kv_heads, head_dim) for _ in range(2))
    prefix = tuple(normal(streams, kv_heads, slots, head_dim) for _ in range(2))
    return q, k, v, prefix if slots else None


def outputs(implementation, mask, soft_cap, arrays):
    """Output, log-sum-exp (0 where nothing is seen) and gradients for cotangents of both."""

    def function(q, k, v, prefix):
        out, lse = attention(
            q, k, v, mask, prefix=prefix, soft_cap=soft_cap, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        return out, jnp.where(jnp.isfinite(lse), lse, 0.0)

    (out, lse), pull = jax.vjp(function, *arrays)
    keys = jax.random.split(jax.random.key(1), 2)
    dout = jax.random.normal(keys[0], out.shape).astype(jnp.bfloat16).astype(out.dtype)
    return out, lse, pull((dout, jax.random.normal(keys[1], lse.shape)))


jitted = jax.jit(outputs, static_argnums=(0, 2))


def ratio(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.sqrt(np.mean((got - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-30)


def agree(mask, arrays, soft_cap=None, poisoned=None):
    """The kernels' results, once compared with the oracle's; `poisoned`: inputs for them alone."""
    got = jitted("pallas_gpu", mask, soft_cap, poisoned or arrays)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), arrays)
    expected = jitted("oracle", mask, soft_cap, wide)
    assert ratio(got[0], expected[0]) < 3e-3
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5, rtol=1e-6)
    for x, y in zip(jax.tree.leaves(got[2]), jax.tree.leaves(expected[2]), strict=True):
        assert ratio(x, y) < 6e-3
    shapes = jax.tree.leaves((arrays[0], arrays))
    for x, y in zip(jax.tree.leaves((got[0], got[2])), shapes, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    return got


CASES = {
    "different in each row": ("packed", {"rows": 2, "T": 128}, {}),
    "several runs, wide head": ("fork_join", {"dtype": "float16", "head_dim": 160}, {}),
    "prefix": ("causal", {"rows": 2, "slots": 5, "streams": 2, "T": 100, "head_dim": 56}, {}),
    "groups, padded head": ("dilated_window", {"heads": 4, "head_dim": 80, "T": 100}, {}),
    "soft cap": ("sliding_window", {"T": 256}, {"soft_cap": 3.0}),
}
SLOW = [name for name in CASES if name != "prefix"]  # 10 s each


@off_gpu
@pytest.mark.parametrize(
    "name", ["prefix", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_interpreted(name, interpreter):
    kind, changes, options = CASES[name]
    sizes = {"T": 150, **changes}
    mask = example(kind, sizes.get("rows", 1), sizes["T"])
    agree(mask, inputs(**sizes), **options)


@pytest.mark.slow
@off_gpu
def test_one_query(interpreter):
    agree(masks.full(), inputs(1, 70, slots=130))


@off_gpu
def test_what_sees_nothing_and_is_not_seen(interpreter):
    """What is hidden may be huge, and NaN in blocks that are hidden as a whole; it gets zeros."""
    T = 200
    s = jnp.arange(T)
    runs = jnp.stack([jnp.full(T, 10), jnp.where(s < 100, 128, 0)])
    arrays = inputs(T)
    q, k, v = (x.at[:, :, 128:].set(jnp.nan) for x in arrays[:3])
    k, v = (x.at[:, :, 100:128].set(1e38) for x in (k, v))
    poisoned = (q.at[:, :, :10].set(1e38), k, v, None)
    mask = masks.Mask(runs[None], queries=T)
    out, _, (dq, dk, dv, _) = agree(mask, arrays, poisoned=poisoned)
    for x in (out, dq):
        np.testing.assert_array_equal(x[:, :, :10], 0)
        np.testing.assert_array_equal(x[:, :, 128:], 0)
    for x in (dk, dv):
        np.testing.assert_array_equal(x[:, :, 100:], 0)


@off_gpu
def test_masks_are_data(interpreter):
    function = jax.jit(lambda mask, *x: attention(*x, mask, implementation="pallas_gpu"))
    arrays = inputs(64)[:3]
    a, b = (function(masks.prefix_lm(64, n), *arrays) for n in (10, 50))
    assert function._cache_size() == 1
    assert not np.array_equal(a, b)


@off_gpu
def test_bad_input(interpreter):
    def call(q, k, v, _):
        attention(q, k, v, masks.full(), implementation="pallas_gpu")

    with pytest.raises(ValueError, match=r"q\.dtype is float32"):
        call(*inputs(8, dtype="float32"))
    q, k, v, _ = inputs(8)
    with pytest.raises(ValueError, match="v of dtype float16"):
        call(q, k, v.astype("float16"), None)
    with pytest.raises(ValueError, match="head dimension"):
        call(*inputs(8, head_dim=192))


def gradients(length, head_dim=64, runs=1, sharding=None):
    """A function, and arrays for it, that uses all kernels: the gradients of a sum."""

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, kv = array((1, 2, length, 4, head_dim)), array((1, 2, length, 2, head_dim))
    prefix = (array((2, 2, 5, head_dim)),) * 2
    intervals = array((1, runs, 2, length), jnp.int32)

    def function(intervals, *arrays):
        mask = masks.Mask(intervals, causal=True)

        def total(q, k, v, prefix):
            return attention(q, k, v, mask, prefix=prefix, implementation="pallas_gpu").sum()

        return jax.grad(total, (0, 1, 2, 3))(*arrays)

    return jax.jit(function), (intervals, q, kv, kv, prefix)


def test_kernels_do_all_products():
    """One kernel forward; backward those of queries, of keys and of the prefix."""
    function, arrays = gradients(256)
    with dispatch.compiling_for("cuda"):
        program = function.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("custom_call @mosaic_gpu") == 4
    assert "dot_general" not in program


@with_plugin
@pytest.mark.parametrize(("head_dim", "runs"), [(64, 9), (96, 2), (128, 1), (160, 4)])
def test_memory_is_linear(head_dim, runs):
    """And shared memory suffices for masks of several runs."""
    T = 32768
    function, arrays = gradients(T, head_dim, runs, static_gpu.h200())
    with dispatch.compiling_for("cuda"):
        memory = function.lower(*arrays).compile().memory_analysis()
    of_inputs = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    assert memory.temp_size_in_bytes < 2 * of_inputs


@with_plugin
@pytest.mark.multiprocess
def test_compiles_for_an_h200():
    """All products on tensor cores, and nothing of the forward kernel outside registers."""
    for row in static_gpu.rows(head_dims=(64, 128, 160), dtypes=("bfloat16",)):
        assert row.wgmma > 0
        assert row.shared <= 227 * 1024
        if row.kernel == "attention_forward":
            assert row.spilled == 0, row


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [56, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("kind", ["causal", "packed", "fork_join", "dilated_window", "tree"])
def test_on_gpu(kind, head_dim):
    T = 700
    agree(example(kind, 2, T), inputs(T, heads=8, kv_heads=2, head_dim=head_dim, rows=2))
    arrays = inputs(T, heads=4, kv_heads=4, head_dim=head_dim, rows=2, streams=2, slots=48)
    agree(example(kind, 2, T), arrays, soft_cap=20.0)
