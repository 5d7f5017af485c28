"""Linear attention: the recurrence against plain NumPy, the other forms against the recurrence.

Errors are RMS ratios. In float64 the forms are one function, to 1e-12. In float32 sums of some
hundred products end within 1e-6, gradients within 1e-5; in bfloat16 outputs, rounded once, within
3e-3, and gradients, of rounded inputs and cotangents, within 6e-3, those of gates, which are sums
over a head, within 1e-2.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_cases import HAS_BETA, RECURRENCES, arguments, errors, outputs, with_gradients

from pallas_kernels import NormalizedState, dispatch, linear_attention
from pallas_kernels.linear.inverse import unit_lower_inverse

run = jax.jit(with_gradients, static_argnames=("implementation", "chunk"))
run_forward = jax.jit(outputs, static_argnames=("implementation", "chunk"))


def check(got, expected, forward, gradient, gates=None):
    for name, error in errors(got, expected).items():
        is_gate = name in ("dlog_decay", "dbeta", "dinput_gate")
        limit = gradient if name[0] == "d" else forward
        assert error < (gates if gates and is_gate else limit), (name, error)


def by_hand(arrays, named):
    """The definition, in a loop over numbers of the first batch row."""
    q, k, v = (np.asarray(x[0], np.float64) for x in arrays)
    P, T, K, hk = q.shape
    H, hv = v.shape[2:]
    decay, beta, gate = (
        None if name not in named else np.asarray(named[name][0], np.float64)
        for name in ("log_decay", "beta", "input_gate")
    )
    ids = np.asarray(named["segment_ids"][0])
    restart = jax.tree.map(lambda x: np.asarray(x, np.float64), named["restart_state"])
    out = np.zeros((P, T, H, hv))
    for p in range(P):
        for head in range(H):
            last = None
            for t in range(T):
                if ids[t] == 0:
                    continue
                if ids[t] != last:
                    if gate is None:
                        S, n = restart[p, head], np.zeros(hk)
                    else:
                        unit = np.exp(restart.maximum[p, head])
                        S, n = restart.matrix[p, head] * unit, restart.normalizer[p, head] * unit
                    last = ids[t]
                key, query = k[p, t, head // (H // K)], q[p, t, head // (H // K)] / hk**0.5
                factor = 1.0 if decay is None else np.exp(np.broadcast_to(decay[p, t, head], hk))
                weight = 1.0 if gate is None else np.exp(gate[p, t, head])
                S = (factor * np.ones(hk))[:, None] * S
                n = factor * n + weight * key
                if beta is not None:
                    S = S - beta[p, t, head] * np.outer(key, key @ S)
                    weight = beta[p, t, head]
                S = S + weight * np.outer(key, v[p, t, head])
                divisor = 1.0 if gate is None else max(abs(query @ n), 1.0)
                out[p, t, head] = query @ S / divisor
    return out


@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_the_oracle_is_the_definition(recurrence):
    arrays, named = arguments(recurrence, T=40)
    out, _ = run_forward(arrays, named, "oracle")
    expected = by_hand(arrays, named)
    np.testing.assert_allclose(out[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("recurrence", "strong"), [*((x, 50) for x in RECURRENCES), ("gla", 0.1), ("kda", 0.1)]
)
def test_three_forms_are_one_function(recurrence, strong):
    with jax.enable_x64(True):
        arrays, named = arguments(recurrence, T=70, dtype=np.float64, strong=strong)
        expected = run_forward(arrays, named, "oracle")
        for form, chunk in (("quadratic", None), ("xla", 16)):
            got = run_forward(arrays, named, form, chunk)
            for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
                assert errors({"": one}, {"": other})[""] < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["gla", "kda"])
def test_mild_decays_and_their_gradients(recurrence):
    arrays, named = arguments(recurrence, T=75, strong=0.1)
    check(run(arrays, named, "xla", 32), run(arrays, named, "oracle"), 1e-6, 1e-5)


@pytest.mark.parametrize(
    "recurrence",
    [x if x == "kda" else pytest.param(x, marks=pytest.mark.slow)
     for x in RECURRENCES],
)  # fmt: skip
def test_chunks_and_their_gradients(recurrence):
    arrays, named = arguments(recurrence, T=75)
    check(run(arrays, named, "xla", 32), run(arrays, named, "oracle"), 1e-6, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("T", [1, 64, 300])
@pytest.mark.parametrize("how", [{"initial": True}, {"documents": False}])
def test_lengths_and_states(recurrence, T, how):
    arrays, named = arguments(recurrence, T, restart=not how, **how)
    check(run(arrays, named, "xla", 64), run(arrays, named, "oracle"), 1e-6, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_bfloat16(recurrence):
    arrays, named = arguments(recurrence, T=150, dtype=jnp.bfloat16)
    exact = run([x.astype(jnp.float32) for x in arrays], named, "oracle")
    got = run(arrays, named, "xla")
    assert got["out"].dtype == got["dq"].dtype == jnp.bfloat16
    check(got, exact, 3e-3, 6e-3, 1e-2)


@pytest.mark.parametrize(
    "recurrence",
    ["gated_delta_net", *(pytest.param(x, marks=pytest.mark.slow) for x in ("gla", "mlstm"))],
)
def test_one_token_at_a_time(recurrence):
    """Decoding: each call goes on from the state of the one before."""
    arrays, named = arguments(recurrence, T=12, documents=False, initial=True, restart=False)
    normalize = recurrence == "mlstm"
    step = jax.jit(functools.partial(linear_attention, normalize=normalize))
    state, outs = named.pop("initial_state"), []
    whole, end = linear_attention(
        *arrays, **named, normalize=normalize, initial_state=state, implementation="xla"
    )
    for t in range(12):
        at = lambda x, t=t: x[:, :, t : t + 1]
        out, state = step(*map(at, arrays), **jax.tree.map(at, named), initial_state=state)
        outs.append(out)
    for one, other in zip(
        jax.tree.leaves((jnp.concatenate(outs, 2), state)), jax.tree.leaves((whole, end)),
        strict=True,
    ):  # fmt: skip
        assert errors({"": one}, {"": other})[""] < 1e-6


def check_as_exact_as_the_recurrence(arrays, named):
    """In float32, against float64, where the problem itself magnifies what is rounded."""
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda x: x if x.dtype == jnp.int32 else jnp.asarray(x, jnp.float64), (arrays, named)
        )
        exact = run(*wide, "oracle")
    got, scan = (errors(run(arrays, named, form), exact) for form in ("xla", "oracle"))
    for name, error in got.items():
        assert error < max(2e-6, 4 * scan[name]), (name, error, scan[name])


@pytest.mark.parametrize(
    "recurrence", ["delta_net", *(pytest.param(x, marks=pytest.mark.slow) for x in HAS_BETA[1:])]
)
def test_correlated_keys(recurrence):
    """Keys at 0.99 to each other and betas up to 2: a series of powers would give NaN."""
    (q, k, v), named = arguments(recurrence, T=130, documents=False, restart=False)
    common = np.random.default_rng(1).standard_normal(k.shape[-1])
    k = common / np.linalg.norm(common) + 0.1 * k
    if "log_decay" in named:
        named["log_decay"] = jnp.maximum(named["log_decay"], -0.01)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    check_as_exact_as_the_recurrence((q, k, v), named)


def test_extreme_gates():
    """Gates of exp(30) and exp(-30): divisors, sums that cancel, lose digits in any form."""
    arrays, named = arguments("mlstm", T=100)
    named["input_gate"] = jnp.where(named["input_gate"] > 0, 30.0, -30.0)
    check_as_exact_as_the_recurrence(arrays, named)


def test_the_maximum_is_a_unit():
    """The same state in other units gives the same output."""
    arrays, named = arguments("mlstm", T=30, initial=True, restart=False)
    state = named["initial_state"]
    other = NormalizedState(
        state.matrix * jnp.exp(-2.0), state.normalizer * jnp.exp(-2.0), state.maximum + 2.0
    )
    one, two = (
        run_forward(arrays, {**named, "initial_state": x}, "xla")[0] for x in (state, other)
    )
    assert errors({"": one}, {"": two})[""] < 1e-5


def test_padding_is_not_looked_at():
    arrays, named = arguments("gated_delta_net", T=50)
    is_padding = (named["segment_ids"] == 0)[:, None, :, None, None]
    poisoned = tuple(jnp.where(is_padding, jnp.nan, x) for x in arrays)
    clean, other = (run(x, named, "xla", 16) for x in (arrays, poisoned))
    for name, one in clean.items():
        assert np.array_equal(one, other[name]), name
    assert not np.asarray(jnp.where(is_padding, clean["out"], 0)).any()


@pytest.mark.parametrize("recurrence", ["retention", pytest.param("kda", marks=pytest.mark.slow)])
def test_memory_is_linear_in_the_length(recurrence):
    def temporary(T):
        arrays, named = jax.eval_shape(lambda: arguments(recurrence, T, B=1, P=1, documents=False))
        program = run.lower(arrays, named, "xla", 64).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(2**15) < 1.1 * 8 * temporary(2**12)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_inverse(size):
    random = np.random.default_rng(0)
    a = np.tril(1 + 0.1 * random.standard_normal((3, size, size)), -1).astype(np.float32)
    expected = np.linalg.inv(np.eye(size) + a.astype(np.float64))
    assert errors({"": unit_lower_inverse(jnp.asarray(a))}, {"": expected})[""] < 1e-6


def call(**changes):
    arrays = {name: jnp.zeros((2, 3, 4, 8)) for name in ("q", "k", "v")}
    arguments = {**arrays, **changes}
    return linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


STATE = NormalizedState(jnp.zeros((2, 4, 8, 8)), jnp.zeros((2, 4, 8)), jnp.zeros((2, 4)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.zeros((2, 3, 4, 8), int)}, "q.dtype is int32"),
        ({"k": jnp.zeros((2, 3, 4, 6))}, "expected q, k"),
        ({"v": jnp.zeros((2, 3, 6, 8))}, "6 value heads: expected a multiple of the 4 key heads"),
        ({"beta": jnp.zeros((2, 3, 4, 8))}, r"beta \(2, 3, 4, 8\): expected \(2, 3, 4\)"),
        ({"log_decay": jnp.zeros((2, 3))}, r"expected \(2, 3, 4\) or \(2, 3, 4, 8\)"),
        ({"beta": jnp.zeros((2, 3, 4)), "input_gate": jnp.zeros((2, 3, 4))}, "one of them"),
        ({"beta": jnp.zeros((2, 3, 4)), "normalize": True}, "no normalizer"),
        ({"log_decay": jnp.zeros((2, 3, 4, 8)), "normalize": True}, "one decay for each head"),
        ({"segment_ids": jnp.zeros((2, 4), int)}, r"segment_ids \(2, 4\)"),
        ({"initial_state": jnp.zeros((3, 4, 8, 8))}, r"initial_state of shape \(3, 4, 8, 8\)"),
        ({"initial_state": STATE}, "initial_state is a NormalizedState: expected an array"),
        ({"restart_state": STATE.matrix, "normalize": True}, "expected a NormalizedState"),
        ({"restart_state": STATE._replace(maximum=0.0), "normalize": True}, "restart_state of"),
        ({"chunk": 48}, "chunk=48: expected a power of 2"),
        ({"scale": jnp.ones(3)}, "scale="),
        ({"implementation": "triton"}, "expected one of oracle, quadratic, xla, pallas_tpu"),
        ({"implementation": "pallas_tpu"}, "cannot run here"),
    ],
)
def test_bad_input(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize("recurrence", RECURRENCES)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_without_a_choice_it_is_lowered_with_its_gradients_for_a_kernel_s_platform(
    platform, recurrence
):
    arrays, named = arguments(recurrence, 128, hk=64, hv=64, dtype=jnp.bfloat16, initial=True)

    def loss(arrays, named):
        out, end = outputs(arrays, named)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves((out, end)))

    ids = {"segment_ids": named.pop("segment_ids")}
    gradient = jax.jit(jax.grad(lambda arrays, named: loss(arrays, named | ids), (0, 1)))
    with dispatch.compiling_for(platform):
        lowered = gradient.trace(arrays, named).lower(lowering_platforms=(platform,))
    assert lowered.as_text().count("mosaic" if platform == "cuda" else "tpu_custom_call") >= 2
