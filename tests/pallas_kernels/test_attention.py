"""Attention: the oracle against plain NumPy, every other form against the oracle.

Errors are RMS ratios, float32 at most 1e-6 for outputs and 1e-5 for gradients. In bfloat16 one
rounding of a number is 2^-9 = 2e-3, and outputs, which are rounded once at the end, get 3e-3; the
products of the backward pass have inputs that were rounded before, and get 6e-3.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, masks

B, P, M = 2, 2, 5


def inputs(T, S=None, heads=4, kv_heads=2, head_dim=16, prefix=True, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 5)
    S = S or T
    q = jax.random.normal(keys[0], (B, P, T, heads, head_dim), dtype)
    k = jax.random.normal(keys[1], (B, P, S, kv_heads, head_dim), dtype)
    v = jax.random.normal(keys[2], (B, P, S, kv_heads, head_dim), dtype)
    slots = [jax.random.normal(key, (P, kv_heads, M, head_dim), dtype) for key in keys[3:]]
    return q, k, v, tuple(slots) if prefix else None


def documents(T, seed=0):
    """Rows of documents of random lengths, with padding at the end of the first."""
    borders = np.random.default_rng(seed).random((B, T)) < 0.05
    ids = np.cumsum(borders, 1) + 1
    ids[0, -(T // 6 + 1) :] = 0
    return jnp.asarray(ids)


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
    keys = jax.random.split(jax.random.key(9), 2)
    cotangents = (
        jax.random.normal(keys[0], out.shape, out.dtype),
        jax.random.normal(keys[1], lse.shape, lse.dtype),
    )
    return (out, lse), pull(cotangents)


def compare(mask, arrays, soft_cap=None, forward=1e-6, gradient=1e-5):
    got, expected = (
        jax.jit(run, static_argnums=(0, 2))(name, mask, soft_cap, arrays)
        for name in ("xla", "oracle")
    )
    for tolerance, results in ((forward, 0), (gradient, 1)):
        pairs = zip(jax.tree.leaves(got[results]), jax.tree.leaves(expected[results]), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert ratio(one, other) < tolerance


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_oracle_is_the_definition(soft_cap):
    T, heads, kv_heads = 7, 4, 2
    q, k, v, prefix = inputs(T, heads=heads, kv_heads=kv_heads)
    ids = documents(T)
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
    [("packed", T) for T in (1, 2, 128, 129, 300)]
    + [("causal", T) for T in (2, 300)]
    + [("full", 129)],
)
def test_lengths_and_masks(T, kind):
    mask = {
        "causal": masks.causal(),
        "packed": masks.packed(documents(T)),
        "full": masks.full(),
    }[kind]
    compare(mask, inputs(T, prefix=kind != "full"))


@pytest.mark.parametrize("heads", [2, 16])
def test_query_heads_that_share_a_key_head(heads):
    compare(masks.causal(), inputs(130, heads=heads))


@pytest.mark.parametrize("head_dim", [56, 160])
def test_head_widths_of_the_paper(head_dim):
    compare(masks.causal(), inputs(129, head_dim=head_dim, prefix=False))


@pytest.mark.parametrize("T", [40, 140])
def test_soft_cap(T):
    compare(masks.packed(documents(T)), inputs(T), soft_cap=2.0)


@pytest.mark.parametrize(("T", "S"), [(3, 50), (128, 200), (200, 130)])
def test_as_many_keys_as_the_cache_has_slots(T, S):
    positions = jnp.arange(T) + jnp.array([[0], [4]])
    compare(masks.cached(positions, S), inputs(T, S))


@pytest.mark.parametrize("T", [24, 140])
def test_rows_that_see_nothing(T):
    """Zero output, log-sum-exp -inf, zero and finite gradients, though what is hidden is huge."""
    q, k, v, _ = inputs(T)
    ids = documents(T)
    hidden = (ids == 0)[:, None, :, None, None]
    k, v = jnp.where(hidden, 1e18, k), jnp.where(hidden, 1e18, v)

    def total(q, k, v):
        out, lse = attention(q, k, v, masks.packed(ids), return_lse=True)
        return jnp.sum(out**2), (out, lse)

    gradients, (out, lse) = jax.grad(total, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    empty = np.asarray(ids == 0)
    assert (np.moveaxis(np.asarray(out), 1, 2)[empty] == 0).all()
    assert np.isneginf(np.moveaxis(np.asarray(lse), 1, 2)[empty]).all()
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert (np.moveaxis(np.asarray(gradient), 1, 2)[empty] == 0).all()


@pytest.mark.parametrize("T", [32, 192])
def test_bfloat16(T):
    arrays = inputs(T, dtype=jnp.bfloat16)
    compare(masks.causal(), arrays, forward=3e-3, gradient=6e-3)
    assert attention(*arrays[:3], masks.causal()).dtype == jnp.bfloat16


def test_causality_by_gradient():
    q, k, v, prefix = inputs(150)
    at = 130

    def out_at(k, v):
        return jnp.sum(attention(q, k, v, masks.causal(), prefix=prefix)[:, :, at])

    for gradient in jax.grad(out_at, argnums=(0, 1))(k, v):
        size = np.abs(np.asarray(gradient)).sum((0, 1, 3, 4))
        assert (size[: at + 1] > 0).all()
        assert (size[at + 1 :] == 0).all()


def test_no_array_of_all_scores_in_long_sequences():
    """Compiled only: temporary memory stays far below one float32 [T, T] array a head."""
    T = 16384
    shape = lambda heads: jax.ShapeDtypeStruct((1, 1, T, heads, 16), jnp.float32)

    def total(q, k, v):
        return jnp.sum(attention(q, k, v, masks.causal()))

    compiled = jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(shape(2), shape(1), shape(1))
    memory = compiled.compile().memory_analysis().temp_size_in_bytes
    assert memory < T * T * 4 / 4


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
