"""The named recurrences are `linear_attention` with their gates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import arguments

from pallas_kernels import linear_attention
from pallas_kernels.linear import forms


def test_retention_decays_by_its_heads():
    (q, k, v), _ = arguments("plain", T=5, B=1, P=1, documents=False)
    out, _ = forms.retention(q, k, v)
    q, k, v = (np.asarray(x[0, 0], np.float64) for x in (q, k, v))
    for head in range(4):
        fade = (1 - 2.0 ** (-5 - head)) ** (np.arange(5)[:, None] - np.arange(5))
        scores = np.tril(q[:, head // 2] @ k[:, head // 2].T * fade) / 8**0.5
        np.testing.assert_allclose(out[0, 0, :, head], scores @ v[:, head], atol=1e-5)


def test_mlstm_gates():
    (q, k, v), _ = arguments("plain", T=5, documents=False, restart=False)
    into, forget = jax.random.normal(jax.random.key(0), (2, *v.shape[:-1]))
    decay = jax.nn.log_sigmoid(forget)
    out, state = forms.mlstm(q, k, v, into, forget)
    expected, _ = linear_attention(q, k, v, log_decay=decay, input_gate=into, normalize=True)
    np.testing.assert_array_equal(out, expected)
    assert state.maximum.shape == (2, 2, 4)
    out, _ = forms.mlstm(q, k, v, into, forget, gate="sigmoid")
    gated = jax.nn.sigmoid(into)[..., None] * v
    expected, _ = linear_attention(q, k, gated, log_decay=decay)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    with pytest.raises(ValueError, match="gate='relu'"):
        forms.mlstm(q, k, v, into, forget, gate="relu")


@pytest.mark.parametrize(
    ("name", "recurrence"),
    [
        ("gated_linear_attention", "gla"),
        ("delta_net", "delta_net"),
        ("gated_delta_net", "gated_delta_net"),
        ("kimi_delta_attention", "kda"),
    ],
)
def test_gates_are_passed_on(name, recurrence):
    arrays, named = arguments(recurrence, T=5)
    expected = linear_attention(*arrays, **named)
    got = getattr(forms, name)(*arrays, **named)
    for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["gated_linear_attention", "kimi_delta_attention"])
def test_a_decay_for_each_dimension_is_expected(name):
    arrays, named = arguments("gated_delta_net", T=5)
    gates = [named["log_decay"]] + ([named["beta"]] if "delta" in name else [])
    with pytest.raises(ValueError, match=r"log_decay \(2, 2, 5, 4\): expected \(2, 2, 5, 4, 8\)"):
        getattr(forms, name)(*arrays, *gates)
    with pytest.raises(ValueError, match="expected"):
        forms.gated_delta_net(*arrays, jnp.zeros((2, 2, 5, 4, 8)), jnp.zeros((2, 2, 5, 4)))
