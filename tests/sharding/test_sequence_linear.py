"""Recurrences over the sequence axis, by every scheme, against the op on one device.

Relative RMS errors of outputs, final states and all gradients, float32: 1e-6 is some ten roundings.
Gradients of the mLSTM's gates are differences of sums: the op on one device, in chunks of 16, is up
to 4e-6 from its float64 form.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequence_cases import errors, on_mesh, spec, with_gradients

from pallas_kernels import NormalizedState, linear_attention
from pallas_kernels.linear.aaren import AarenState, aaren
from sharding.sequence.aaren import sequence_aaren
from sharding.sequence.linear import sequence_linear_attention

B, P, K, H, hk, hv = 2, 2, 2, 4, 6, 8
DELTA = ("delta_net", "gated_delta_net", "kda")
RECURRENCES = ("plain", "retention", "gla", "mlstm", *DELTA)


def documents(T):
    """Ids whose documents end within parts, on borders and several parts later; and padding, also
    where a part of 4, or a row, begins."""
    one = np.repeat([1, 2, 3, 4], [T // 2, T // 4 - 3, 1, T - T // 2 - T // 4 + 2])
    two = np.repeat([0, 7, 0, 9, 0, 3, 0], [2, 3, T // 4, 2, T // 4 + 1, 1, T - 2 * (T // 4) - 9])
    return jnp.asarray(np.stack([one, two]), jnp.int32)


def arguments(recurrence, T, *, states=True, ids=True):
    """q, k, v, gates and states by name."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)
    x = {"q": normal(B, P, T, K, hk), "k": normal(B, P, T, K, hk), "v": normal(B, P, T, H, hv)}
    if recurrence in ("retention", "gated_delta_net", "mlstm", "gla", "kda"):
        shape = (B, P, T, H) + (hk,) * (recurrence in ("gla", "kda"))
        strong = np.where(random.random(shape) < 0.05, 20, 0.1)
        x["log_decay"] = (-np.exp(normal(*shape)) * strong).astype(np.float32)
    if recurrence in DELTA:
        x["k"] /= np.linalg.norm(x["k"], axis=-1, keepdims=True)
        x["beta"] = 2 * random.random((B, P, T, H), np.float32)
    if recurrence == "mlstm":
        x["input_gate"] = normal(B, P, T, H)
    if states:
        for name, lead in (("initial_state", (B, P)), ("restart_state", (P,))):
            matrix = normal(*lead, H, hk, hv)
            state = NormalizedState(matrix, normal(*lead, H, hk), normal(*lead, H))
            x[name] = state if recurrence == "mlstm" else matrix
    return jax.tree.map(jnp.asarray, x), documents(T) if ids else None


def op(function, x, ids):
    """Output and final state, that of a normalized recurrence in units of 1."""
    normalize = "input_gate" in x
    q, k, v, named = x["q"], x["k"], x["v"], {n: y for n, y in x.items() if n not in "qkv"}
    out, state = function(q, k, v, **named, segment_ids=ids, normalize=normalize)
    if normalize:
        unit = jax.lax.stop_gradient(jnp.exp(state.maximum))
        state = (state.matrix * unit[..., None, None], state.normalizer * unit[..., None])
    return out, state


def assert_equal(recurrence, scheme, T, axes, **which):
    x, ids = arguments(recurrence, T, **which)
    expected = with_gradients(functools.partial(op, linear_attention), x, ids)
    with on_mesh(state=scheme, **axes):
        function = functools.partial(sequence_linear_attention, q_spec=spec(), v_spec=spec())
        got = with_gradients(functools.partial(op, function), x, ids)
    found = errors(got, expected)
    assert max(found.values()) < (3e-6 if recurrence == "mlstm" else 1e-6), found


@pytest.mark.parametrize(
    ("recurrence", "scheme", "parts"),
    [
        pytest.param("gla", "steps", 4, marks=pytest.mark.slow),
        ("gated_delta_net", "gather", 4),
        pytest.param("mlstm", "steps", 2, marks=pytest.mark.slow),
    ],
)
def test_recurrence(little_optimization, recurrence, scheme, parts):
    assert_equal(recurrence, scheme, 32, {"sequence": parts})


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3, 4, 8])
@pytest.mark.parametrize("scheme", ["gather", "steps"])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_number_of_devices(little_optimization, recurrence, scheme, parts):
    assert_equal(recurrence, scheme, 48, {"sequence": parts})


@pytest.mark.slow
@pytest.mark.parametrize("states", [True, False])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_without_documents_or_states(little_optimization, recurrence, states):
    """Then every part leaves something of what comes in."""
    assert_equal(recurrence, "gather", 48, {"sequence": 4}, ids=False, states=states)
    assert_equal(recurrence, "steps", 48, {"sequence": 3}, states=False)


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["gla", "mlstm", "kda"])
def test_on_a_mesh_of_three_axes(little_optimization, recurrence):
    """Streams and heads are divided too; parts are longer than a chunk of the op."""
    assert_equal(recurrence, "gather", 264, {"stream": 2, "sequence": 2, "tensor": 2})
    assert_equal(recurrence, "steps", 264, {"data": 2, "sequence": 4})


def test_only_states_travel(little_optimization):
    """Nothing that goes between devices has an axis of positions."""
    x, _ = arguments("gated_delta_net", 40, ids=False, states=False)
    for scheme, name in (("gather", "all-gather"), ("steps", "collective-permute")):
        with on_mesh(state=scheme, sequence=4) as mesh:
            place = lambda y: jax.device_put(
                y, jax.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec()[: min(y.ndim, 4)]))
            )
            function = functools.partial(sequence_linear_attention, q_spec=spec(), v_spec=spec())
            program = jax.jit(lambda x, function: op(function, x, None)[0], static_argnums=1)
            text = program.lower(jax.tree.map(place, x), function).compile().as_text()
        moved = [line.split("(")[0] for line in text.splitlines() if f" {name}(" in line]
        assert moved
        assert not [line for line in moved if "[10," in line or ",10," in line or ",40," in line]
        others = {"all-gather", "all-to-all", "collective-permute", "all-reduce"} - {name}
        assert not [other for other in others if f" {other}(" in text]


def aaren_arguments(T):
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    restart = AarenState(normal(P, H), jnp.exp(normal(P, H)), normal(P, H, hv))
    return {
        "q": normal(H, hk), "k": normal(B, P, T, H, hk), "v": normal(B, P, T, H, hv),
        "restart_state": restart,
    }  # fmt: skip


def aaren_op(function, x, ids):
    out, state = function(**x, segment_ids=ids)
    # What a state holds is in units of its maximum, a constant to gradients.
    unit = jax.lax.stop_gradient(jnp.exp(jnp.maximum(state.maximum, -60.0)))
    return out, state.total * unit, state.weighted * unit[..., None]


def assert_aaren_equal(scheme, T, axes, restart=True, ids=True):
    x, ids = aaren_arguments(T), documents(T) if ids else None
    if not restart:
        del x["restart_state"]
    expected = with_gradients(functools.partial(aaren_op, aaren), x, ids)
    with on_mesh(state=scheme, **axes):
        function = functools.partial(sequence_aaren, spec=spec())
        got = with_gradients(functools.partial(aaren_op, function), x, ids)
    found = errors(got, expected)
    assert max(found.values()) < 1e-6, found


def test_aaren(little_optimization):
    assert_aaren_equal("steps", 32, {"sequence": 4})


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 3, 8])
@pytest.mark.parametrize("scheme", ["gather", "steps"])
def test_aaren_on_other_meshes(little_optimization, scheme, parts):
    for restart in (True, False):
        for ids in (True, False):
            assert_aaren_equal(scheme, 48, {"sequence": parts}, restart, ids)
