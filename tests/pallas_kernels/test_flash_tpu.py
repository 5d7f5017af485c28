"""Attention for TPU: its numbers, in interpreters, against the oracle; its programs, compiled.

Errors are RMS ratios, with the bounds of `test_attention`. Compilation is for TPUs that need not be
there: libtpu is enough.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_programs
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dispatch, masks
from pallas_kernels.flash import oracle, tpu, tpu_common
from pallas_kernels.flash.options import Options
from pallas_kernels.masks.blocks import FULL

N, P = 2, 2


def per_row(mask):
    """The mask with the leading axes [N or 1, P or 1]."""
    if mask.intervals is None:
        return mask
    axes = mask.intervals.shape[:-3]
    axes = axes + (1,) * (2 - len(axes))
    return dataclasses.replace(
        mask, intervals=mask.intervals.reshape(*axes, *mask.intervals.shape[-3:])
    )


def inputs(T, S=None, K=2, G=1, h=16, M=0, dtype=jnp.float32):
    """q, k, v, prefix, and cotangents of output and log-sum-exp."""
    random = np.random.default_rng(0)

    def normal(*shape, dtype=dtype):
        return jnp.asarray(random.standard_normal(shape, np.float32), dtype)

    S = S or T
    q, dout = normal(N, P, T, K, G, h), normal(N, P, T, K, G, h)
    k, v = normal(N, P, S, K, h), normal(N, P, S, K, h)
    prefix = (normal(P, K, M, h), normal(P, K, M, h)) if M else None
    return q, k, v, prefix, dout, normal(N, P, T, K, G, dtype=jnp.float32)


def run(options, blocks, mask, q, k, v, prefix, dout, dlse):
    out, lse = tpu.forward(options, q, k, v, mask, prefix, blocks=blocks)
    gradients = tpu.backward(options, q, k, v, mask, prefix, out, lse, dout, dlse, blocks=blocks)
    return out, lse, gradients


jitted = jax.jit(run, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=0)
def expected(options, mask, q, k, v, prefix, dout, dlse):
    def function(q, k, v, prefix):
        out, lse = oracle.attention(options, q, k, v, mask, prefix)
        return out, jnp.where(lse > -jnp.inf, lse, 0.0), lse

    (out, _, lse), pull = jax.vjp(function, q, k, v, prefix)
    return out, lse, pull((dout, dlse, jnp.zeros_like(lse)))


def ratio(got, wanted):
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    return np.sqrt(np.mean((got - wanted) ** 2)) / max(np.sqrt(np.mean(wanted**2)), 1e-30)


def assert_equal_to_oracle(options, blocks, mask, arrays):
    out, lse, gradients = jitted(options, blocks, mask, *arrays)
    wanted, wanted_lse, wanted_gradients = expected(options, mask, *arrays)
    narrow = out.dtype == jnp.bfloat16
    assert out.dtype == arrays[0].dtype
    assert ratio(out, wanted) < (3e-3 if narrow else 1e-6)
    assert np.array_equal(np.isfinite(lse), np.isfinite(wanted_lse))
    seen = np.isfinite(wanted_lse)
    assert np.max(np.abs(lse - wanted_lse), where=seen, initial=0) < (1e-3 if narrow else 1e-5)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted_gradients)
    for got, correct in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(wanted_gradients), strict=True
    ):
        assert got.dtype == correct.dtype
        assert ratio(got, correct) < (6e-3 if narrow else 1e-5)


def documents(T):
    """A row that ends in padding, and one of three documents."""
    t = np.arange(T)
    return np.stack([np.where(t < T * 2 // 3, t // 70 + 1, 0), t * 3 // T + 1])


def fork(T):
    t = np.arange(T)
    inside = ((t > T // 4) & (t < T - 20)).astype(np.int32)
    return masks.fork_join(inside[None], (inside * (1 + (t > T // 2)))[None])


def by_stream(T):
    mask = masks.packed(np.stack([np.ones(T, int), np.arange(T) // 100 + 1]))
    return dataclasses.replace(mask, intervals=mask.intervals[None])


CASES = {
    "causal": (lambda T: masks.causal(), {"T": 256, "h": 64}, None, (128, 128)),
    "full, cut blocks, prefix": (
        lambda T: masks.full(),
        {"T": 200, "K": 1, "G": 4, "h": 56, "M": 5},
        None,
        (32, 128),
    ),
    "packed, rows that see nothing": (
        lambda T: masks.packed(documents(T)),
        {"T": 250, "h": 80},
        None,
        (128, 128),
    ),
    "window, soft cap": (
        lambda T: masks.sliding_window(T, 40),
        {"T": 256, "G": 2, "h": 96},
        5.0,
        (64, 128),
    ),
    "fork and join": (fork, {"T": 220, "K": 1, "G": 8, "h": 32, "M": 3}, None, (16, 128)),
    "dilated": (
        lambda T: masks.dilated_window(T, 8, 5),
        {"T": 256, "K": 1, "h": 128},
        None,
        (128, 128),
    ),
    "by stream": (by_stream, {"T": 256, "M": 2}, None, (128, 128)),
    "one query": (lambda T: masks.causal(), {"T": 1, "K": 1, "G": 8, "h": 160, "M": 3}, None, None),
    "one query, many keys": (
        lambda T: masks.cached(np.array([[70], [200]]), 300),
        {"T": 1, "S": 300, "G": 4},
        None,
        None,
    ),
    "bfloat16": (
        lambda T: masks.causal(),
        {"T": 256, "K": 1, "G": 2, "h": 160, "M": 48, "dtype": jnp.bfloat16},
        20.0,
        (64, 128),
    ),
    "bfloat16, default blocks": (
        lambda T: masks.packed(documents(T)),
        {"T": 130, "h": 128, "dtype": jnp.bfloat16},
        None,
        None,
    ),
}


SLOW = ("full, cut blocks, prefix", "one query, many keys", "dilated", "bfloat16")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES]
)
def test_equal_to_the_oracle(name):
    make, shapes, soft_cap, blocks = CASES[name]
    arrays = inputs(**shapes)
    options = Options(arrays[0].shape[-1] ** -0.5, soft_cap)
    with dispatch.interpreting():
        assert_equal_to_oracle(options, blocks, per_row(make(shapes["T"])), arrays)


def test_no_races_and_nothing_read_before_it_is_written():
    """Memory is full of NaN until it is written, and reads out of bounds raise."""
    arrays = inputs(T=250, K=1, G=2, M=5)
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with dispatch.interpreting(params):
        assert_equal_to_oracle(
            Options(0.25, None), (64, 128), per_row(masks.packed(documents(250))), arrays
        )
    assert not interpret_pallas_call.races.races_found


def test_empty_tiles_are_not_read():
    """What stands in other documents, NaN here, reaches nothing where no tile holds both."""
    T, half = 256, 128
    mask = per_row(masks.packed(np.arange(T) // half + 1))
    q, k, v, prefix, dout, dlse = inputs(T)
    fill = lambda x: x.at[:, :, half:].set(jnp.nan)
    options = Options(0.25, None)
    with dispatch.interpreting():
        clean = jitted(options, (128, 128), mask, q, k, v, prefix, dout, dlse)
        filled = jitted(
            options, (128, 128), mask, fill(q), fill(k), fill(v), prefix, fill(dout), fill(dlse)
        )
    for got, wanted in zip(jax.tree.leaves(filled), jax.tree.leaves(clean), strict=True):
        assert np.array_equal(got[:, :, :half], wanted[:, :, :half])


def test_hidden_keys_of_a_visible_tile_do_not_matter():
    padding = np.array([30, 90])
    mask = per_row(masks.left_padding(256, padding))
    q, k, v, prefix, dout, dlse = inputs(256)
    hidden = (np.arange(256) < padding[:, None])[:, None, :, None, None]
    options = Options(0.25, None)
    with dispatch.interpreting():
        low, huge = (
            jitted(
                options,
                (128, 128),
                mask,
                q,
                jnp.where(hidden, value, k),
                jnp.where(hidden, value, v),
                prefix,
                dout,
                dlse,
            )
            for value in (0.0, 3e38)
        )
    for got, wanted in zip(jax.tree.leaves(huge), jax.tree.leaves(low), strict=True):
        assert np.array_equal(got, wanted)


def test_twenty_masks_compile_once():
    arrays = inputs(T=256, K=1)
    function = jax.jit(lambda mask, *arrays: run(Options(0.25, None), (128, 128), mask, *arrays))
    with dispatch.interpreting():
        for window in range(20):
            ids = np.arange(256) // (20 + window) + 1
            function(per_row(masks.packed(np.stack([ids, ids[::-1].max() - ids + 1]))), *arrays)
    assert function._cache_size() == 1


def test_what_does_not_fit_is_refused():
    kinds = np.full((500, 1, 32, 32), FULL)
    with pytest.raises(ValueError, match="500 lists of 1024 tiles"):
        tpu_common.visits(jnp.asarray(kinds))
    q, k, v, *_ = inputs(16, dtype=jnp.float16)
    with pytest.raises(ValueError, match="float16"):
        tpu.forward(Options(1.0, None), q, k, v, masks.full(), None)


def test_blocks_share_the_sequence_evenly():
    assert tpu.block_sizes((1024, 512), T=4096, S=4096, G=1) == (1024, 512)
    assert tpu.block_sizes((1024, 512), T=1100, S=600, G=1) == (640, 384)
    assert tpu.block_sizes((1024, 512), T=1, S=1, G=8) == (16, 128)
    assert tpu.block_sizes((1024, 512), T=100, S=100, G=48) == (16, 128)


@pytest.fixture(scope="module")
def compiler():
    with tpu_programs.process() as process:
        yield lambda *arguments: process.submit(tpu_programs.compiled, *arguments).result()


@pytest.mark.tpu_compile
@pytest.mark.parametrize("target", tpu_programs.TOPOLOGIES)
def test_compiles_to_kernels_alone(compiler, target):
    narrow = jax.eval_shape(lambda: inputs(T=300, K=1, G=4, h=80, M=48, dtype=jnp.bfloat16))
    wide = jax.eval_shape(lambda: inputs(T=200, h=160))
    two_runs = jax.eval_shape(lambda: per_row(fork(300)))
    for mask, arrays, soft_cap, counts in (
        (two_runs, narrow, 20.0, (1, 3)),
        (masks.causal(), wide, None, (1, 2)),
    ):
        programs = compiler(target, mask, arrays, soft_cap, (64, 128))
        assert [program[:2] for program in programs] == [(count, 0) for count in counts]


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_memory_is_linear_in_the_length(compiler):
    T = 2**15
    arrays = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*x.shape[:2], T, *x.shape[3:]), x.dtype),
        inputs(T=1, K=1, h=128, dtype=jnp.bfloat16),
    )
    mask = jax.eval_shape(lambda: per_row(masks.packed(np.ones((N, T), int))))
    for program in compiler("v5e", mask, arrays, None, (256, 256)):
        # Folded copies of all arrays, and the lists; an array T x T would be 256 times q.
        assert program.temporary < 12 * 2 * N * P * T * 128
