"""Attention: the oracle against plain NumPy, every other form against the oracle.

Errors are RMS ratios, float32 at most 1e-6 for outputs and 1e-5 for gradients. In bfloat16 one
rounding of a number is 2^-9 = 2e-3, and outputs, which are rounded once at the end, get 3e-3; the
products of the backward pass have inputs that were rounded before, and get 6e-3.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, masks
from pallas_kernels.flash import xla_strips
from pallas_kernels.masks.examples import all_masks, documents

B, P, M = 2, 2, 5


def inputs(T, S=None, heads=4, kv_heads=2, head_dim=16, prefix=True, dtype=jnp.float32, seed=0):
    random = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape, np.float32), dtype)
    S = S or T
    q = normal(B, P, T, heads, head_dim)
    k, v = (normal(B, P, S, kv_heads, head_dim) for _ in range(2))
    slots = [normal(P, kv_heads, M, head_dim) for _ in range(2)]
    return q, k, v, tuple(slots) if prefix else None


packed = jax.jit(masks.packed)


def ratio(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.sqrt(np.mean((got - expected) ** 2)) / max(np.sqrt(np.mean(expected**2)), 1e-30)


def finite(lse):
    return jnp.where(jnp.isfinite(lse), lse, 0.0)


def run(implementation, mask, soft_cap, arrays):
    """Output, log-sum-exp and all gradients, for cotangents of both."""

    def function(q, k, v, prefix):
        out, lse = attention(
            q, k, v, mask, prefix=prefix, soft_cap=soft_cap, return_lse=True,
            implementation=implementation,
        )  # fmt: skip
        return out, finite(lse)

    (out, lse), pull = jax.vjp(function, *arrays)
    waves = lambda x: (
        jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape).astype(x.dtype)
    )
    return (out, lse), pull((waves(out), waves(lse)))


jitted = jax.jit(run, static_argnums=(0, 2))


def compare(mask, arrays, soft_cap=None, forward=1e-6, gradient=1e-5):
    got, expected = (jitted(name, mask, soft_cap, arrays) for name in ("xla", "oracle"))
    for tolerance, results in ((forward, 0), (gradient, 1)):
        pairs = zip(jax.tree.leaves(got[results]), jax.tree.leaves(expected[results]), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert ratio(one, other) < tolerance


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_oracle_is_the_definition(soft_cap):
    T, heads, kv_heads = 7, 4, 2
    q, k, v, prefix = inputs(T, heads=heads, kv_heads=kv_heads)
    ids = documents(B, T)
    out, lse = attention(
        q, k, v, masks.packed(ids), prefix=prefix, soft_cap=soft_cap, return_lse=True,
        implementation="oracle",
    )  # fmt: skip
    q, k, v, slot_k, slot_v, ids = (np.asarray(x, np.float64) for x in (q, k, v, *prefix, ids))
    for b, p, t, j in itertools.product(range(B), range(P), range(T), range(heads)):
        head = j // (heads // kv_heads)
        seen = [s for s in range(t + 1) if ids[b, s] == ids[b, t] > 0]
        all_k = np.concatenate([slot_k[p, head], k[b, p, seen, head]])
        all_v = np.concatenate([slot_v[p, head], v[b, p, seen, head]])
        scores = all_k @ q[b, p, t, j] / 4.0
        if soft_cap:
            scores = soft_cap * np.tanh(scores / soft_cap)
        weights = np.exp(scores)
        expected = weights @ all_v / weights.sum()
        np.testing.assert_allclose(out[b, p, t, j], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(lse[b, p, t, j], np.log(weights.sum()), rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "T"),
    [
        ("packed", 1),
        ("packed", 2),
        pytest.param("packed", 128, marks=pytest.mark.slow),
        ("causal", 300),
        ("full", 129),
        pytest.param("causal", xla_strips.LONGEST, marks=pytest.mark.slow),
        pytest.param("causal", xla_strips.LONGEST + 1, marks=pytest.mark.slow),
        pytest.param("full", xla_strips.LONGEST + 1, marks=pytest.mark.slow),
        pytest.param("packed", xla_strips.LONGEST_WITH_INTERVALS, marks=pytest.mark.slow),
        ("packed", xla_strips.LONGEST_WITH_INTERVALS + 1),
    ],
)
def test_lengths_and_masks(T, kind):
    mask = {
        "causal": masks.causal(),
        "packed": packed(documents(B, T)),
        "full": masks.full(),
    }[kind]
    compare(mask, inputs(T, prefix=kind != "full"))


def same_shape(mask, rows: int, length: int, runs: int):
    """The same visibility, but as `runs` runs for each row and nothing static but the dilation."""
    nothing = masks.Mask(jnp.zeros((rows, 1, 2, length), jnp.int32), queries=length)
    plain = dataclasses.replace(mask, dilation=1, queries=length)
    if mask.intervals is None and not mask.causal:
        plain = masks.first_keys(length, length)
    intervals = (plain | nothing).intervals
    padding = [(0, 0)] * intervals.ndim
    padding[-3] = (0, runs - intervals.shape[-3])
    return masks.Mask(jnp.pad(intervals, padding), dilation=mask.dilation)


@pytest.mark.parametrize("T", [200, pytest.param(300, marks=pytest.mark.slow)])
def test_every_mask_and_one_compilation_for_all(T):
    """Masks of one shape differ in data alone: all but the dilated one share a compiled program.

    The first length is computed in strips, the second in tiles.
    """
    arrays = inputs(T)
    jitted.clear_cache()
    for name, mask in all_masks(B, T).items():
        try:
            compare(same_shape(mask, B, T, runs=6), arrays)
        except AssertionError as error:
            raise AssertionError(f"mask {name}") from error
    assert jitted._cache_size() == 2 * 2


@pytest.mark.parametrize(("T", "S"), [(130, 130), (130, 530)])
def test_keys_beyond_the_last_stay_hidden_without_runs(T, S):
    compare(masks.Mask(dilation=5), inputs(T, S))


def test_arrays_of_size_zero():
    q, k, v, (slot_k, slot_v) = inputs(140)
    out = attention(q, k[:, :, :0], v[:, :, :0], masks.full(), prefix=(slot_k, slot_v))
    expected = attention(
        q, k[:, :, :0], v[:, :, :0], masks.full(), prefix=(slot_k, slot_v), implementation="oracle"
    )
    assert ratio(out, expected) < 1e-6
    assert attention(q[:0], k[:0], v[:0], masks.causal()).shape == (0, *q.shape[1:])
    none = (slot_k[:, :, :0], slot_v[:, :, :0])
    gradient = jax.grad(lambda x: jnp.sum(attention(q, k, v, masks.causal(), prefix=x)))(none)
    assert [x.shape for x in gradient] == [x.shape for x in none]


@pytest.mark.parametrize("T", [260, pytest.param(150, marks=pytest.mark.slow)])
def test_masks_of_streams_may_differ(T):
    intervals = jnp.stack([packed(documents(B, T, seed)).intervals for seed in range(P)], 1)
    compare(masks.Mask(intervals, causal=True), inputs(T))


def test_streams_of_a_row_in_several_steps(monkeypatch):
    """Too many heads for the streams of a row to share a step: each finds its prefix and mask."""
    monkeypatch.setattr(xla_strips, "SCORES", 2**14)
    jitted.clear_cache()
    intervals = jnp.stack([packed(documents(B, 140, seed)).intervals for seed in range(P)], 1)
    compare(masks.Mask(intervals, causal=True), inputs(140))
    jitted.clear_cache()


def test_what_is_in_hidden_blocks_does_not_matter():
    """Whole blocks of keys that nobody sees hold NaN: outputs and gradients are as without them."""
    T = 320
    q, k, v, prefix = inputs(T)
    ids = jnp.where(jnp.arange(T) < 128, 1, jnp.where(jnp.arange(T) < 256, 0, 2))
    hidden = (ids == 0)[:, None, None]
    poisoned = q, jnp.where(hidden, jnp.nan, k), jnp.where(hidden, jnp.nan, v), prefix
    outputs = [jitted("xla", packed(ids), None, x) for x in ((q, k, v, prefix), poisoned)]
    for one, other in zip(*map(jax.tree.leaves, outputs), strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 56), (4, 64), (8, 80), (1, 96), (4, 128), (8, 160)]
)
@pytest.mark.parametrize("T", [129, pytest.param(520, marks=pytest.mark.slow)])
def test_heads_that_share_a_key_head_and_widths_of_the_paper(group, head_dim, T):
    arrays = inputs(T, heads=group, kv_heads=1, head_dim=head_dim, prefix=False)
    compare(masks.causal(), arrays)


@pytest.mark.parametrize("T", [40, 140, 260])
def test_soft_cap(T):
    compare(packed(documents(B, T)), inputs(T), soft_cap=2.0)


@pytest.mark.parametrize(
    ("T", "S"), [(3, 50), (200, 130), pytest.param(200, 300, marks=pytest.mark.slow)]
)
def test_as_many_keys_as_the_cache_has_slots(T, S):
    positions = jnp.arange(T) + jnp.array([[0], [4]])
    compare(masks.cached(positions, S), inputs(T, S))


@pytest.mark.parametrize("T", [24, 140, 260])
def test_rows_that_see_nothing(T):
    """Zero output, log-sum-exp -inf, zero and finite gradients, though what is hidden is huge."""
    q, k, v, _ = inputs(T)
    ids = documents(B, T)
    hidden = (ids == 0)[:, None, :, None, None]
    k, v = jnp.where(hidden, 1e18, k), jnp.where(hidden, 1e18, v)

    def total(q, k, v):
        out, lse = attention(q, k, v, masks.packed(ids), return_lse=True)
        return jnp.sum(out**2), (out, lse)

    gradients, (out, lse) = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    empty = np.asarray(ids == 0)
    assert (np.moveaxis(np.asarray(out), 1, 2)[empty] == 0).all()
    assert np.isneginf(np.moveaxis(np.asarray(lse), 1, 2)[empty]).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.moveaxis(np.asarray(gradient), 1, 2)[empty] == 0).all()


@pytest.mark.parametrize("T", [32, 192, pytest.param(520, marks=pytest.mark.slow)])
def test_bfloat16(T):
    arrays = inputs(T, dtype=jnp.bfloat16)
    compare(masks.causal(), arrays, forward=3e-3, gradient=6e-3)
    assert attention(*arrays[:3], masks.causal()).dtype == jnp.bfloat16


@pytest.mark.parametrize(("T", "at"), [(150, 130), pytest.param(520, 130, marks=pytest.mark.slow)])
def test_causality_by_gradient(T, at):
    q, k, v, prefix = inputs(T)

    def out_at(k, v):
        return jnp.sum(attention(q, k, v, masks.causal(), prefix=prefix)[:, :, at])

    for gradient in jax.grad(out_at, argnums=(0, 1))(k, v):
        size = np.abs(np.asarray(gradient)).sum((0, 1, 3, 4))
        assert (size[: at + 1] > 0).all()
        assert (size[at + 1 :] == 0).all()


def test_no_array_of_all_scores_in_long_sequences():
    """Compiled only: temporary memory stays far below one array [T, T] of single bits."""
    T = 32768
    shape = lambda heads: jax.ShapeDtypeStruct((1, 1, T, heads, 16), jnp.float32)

    def total(q, k, v, ids):
        return jnp.sum(attention(q, k, v, masks.packed(ids)))

    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    gradient = jax.jit(jax.grad(total, argnums=(0, 1, 2)))
    compiled = gradient.lower(shape(2), shape(1), shape(1), ids).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < T * T / 16


def test_unknown_implementation_is_refused():
    q, k, v, _ = inputs(4)
    with pytest.raises(ValueError, match="expected one of"):
        attention(q, k, v, masks.causal(), implementation="palas_tpu")


def test_shapes_that_do_not_fit_are_refused():
    q, k, v, prefix = inputs(4)
    with pytest.raises(ValueError, match="multiple"):
        attention(q[..., :3, :], k, v, masks.causal())
    with pytest.raises(ValueError, match="prefix"):
        attention(q, k, v, masks.causal(), prefix=tuple(x[:1] for x in prefix))
    with pytest.raises(ValueError, match="causal"):
        attention(q[:, :, :3], k, v, masks.causal())
    with pytest.raises(ValueError, match="mask is a ndarray: expected one of"):
        attention(q, k, v, np.ones((4, 4), bool))
    with pytest.raises(ValueError, match="mask made for 5 queries, q has 4"):
        attention(q, k, v, masks.sliding_window(5, 2))
    with pytest.raises(ValueError, match="mask intervals from 0 to 9: expected 0 to 4"):
        attention(q, k, v, masks.Mask(jnp.array([[[0] * 4, [9] * 4]])))
    with pytest.raises(ValueError, match="expected integers"):
        attention(q, k, v, masks.Mask(jnp.zeros((0, 2, 4), int)))
    with pytest.raises(ValueError, match=r"q\.dtype is int32"):
        attention(*(x.astype(jnp.int32) for x in (q, k, v)), masks.causal())
    with pytest.raises(ValueError, match=r"soft_cap=0\.0"):
        attention(q, k, v, masks.causal(), soft_cap=0.0)
    with pytest.raises(ValueError, match="known when tracing"):
        jax.jit(lambda scale: attention(q, k, v, masks.causal(), scale=scale))(1.0)
    with pytest.raises(ValueError, match="prefix of shapes"):
        attention(q, k, v, masks.causal(), prefix=())
