"""Arguments of linear attention for tests: one set for each recurrence."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import NormalizedState, linear_attention

RECURRENCES = ("plain", "retention", "gla", "delta_net", "gated_delta_net", "kda", "mlstm")
HAS_BETA = ("delta_net", "gated_delta_net", "kda")
PER_KEY = ("gla", "kda")
PER_HEAD = ("retention", "gated_delta_net", "mlstm")


def arguments(
    recurrence, T, *, B=2, P=2, K=2, H=4, hk=8, hv=12, dtype=np.float32, documents=True,
    initial=False, restart=True, strong=50, seed=0,
):  # fmt: skip
    """q, k, v and the keyword arguments: one decay in ten is `strong`, betas are up to 2,
    one token in ten is padding."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape)
    q, k, v = normal(B, P, T, K, hk), normal(B, P, T, K, hk), normal(B, P, T, H, hv)
    named = {}
    if recurrence in PER_HEAD + PER_KEY:
        shape = (B, P, T, H, hk) if recurrence in PER_KEY else (B, P, T, H)
        strength = np.where(random.random(shape) < 0.1, strong, 0.1)
        named["log_decay"] = -np.exp(normal(*shape)) * strength
    if recurrence in HAS_BETA:
        k = k / np.linalg.norm(k, axis=-1, keepdims=True)
        named["beta"] = 2 * random.random((B, P, T, H))
    if recurrence == "mlstm":
        named["input_gate"] = normal(B, P, T, H)
    is_normalized = recurrence == "mlstm"

    def state(*lead):
        parts = normal(*lead, H, hk, hv), normal(*lead, H, hk), normal(*lead, H)
        return NormalizedState(*parts) if is_normalized else parts[0]

    if restart:
        named["restart_state"] = state(P)
    if initial:
        named["initial_state"] = state(B, P)
    named = jax.tree.map(lambda x: jnp.asarray(x, jnp.promote_types(dtype, jnp.float32)), named)
    if documents:
        ids = np.cumsum(random.random((B, T)) < 6 / T, -1) + 1
        named["segment_ids"] = jnp.asarray(ids * (random.random((B, T)) > 0.1), jnp.int32)
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v)), named


def outputs(arrays, named, implementation=None, chunk=None):
    """The output and the final state, that of a normalized recurrence in units of 1."""
    normalize = "input_gate" in named
    out, state = linear_attention(
        *arrays, **named, normalize=normalize, implementation=implementation, chunk=chunk
    )
    if normalize:
        unit = jnp.exp(state.maximum)
        state = state.matrix * unit[..., None, None], state.normalizer * unit[..., None]
    return out, state


def with_gradients(arrays, named, implementation=None, chunk=None):
    """The outputs, and the gradients of all arrays that have some, for cotangents of all outputs.

    Returns:
      {name: array}, gradients as "d" and the name.
    """
    fixed = {name: x for name, x in named.items() if name == "segment_ids"}
    moving = {name: x for name, x in named.items() if name not in fixed}

    def function(arrays, moving):
        return outputs(arrays, {**moving, **fixed}, implementation, chunk)

    results, pull = jax.vjp(function, arrays, moving)
    wave = lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype)
    darrays, dmoving = pull(jax.tree.map(wave, results))
    named_results = dict(zip(("out", "state"), results, strict=True))
    gradients = dict(zip(("dq", "dk", "dv"), darrays, strict=True))
    gradients |= {f"d{name}": x for name, x in dmoving.items()}
    return named_results | gradients


def errors(got, expected) -> dict[str, float]:
    """RMS of the difference over RMS of what is expected, the largest of each result's arrays."""

    def ratio(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return np.sqrt(np.mean((x - y) ** 2)) / max(np.sqrt(np.mean(y**2)), 1e-30)

    return {
        name: max(map(ratio, jax.tree.leaves(got[name]), jax.tree.leaves(expected[name])))
        for name in expected
    }
