"""Linear attention for TPU: its numbers, in interpreters, against the recurrence; its programs,
compiled for TPUs that need not be there.

Errors are RMS ratios, with the bounds of `test_linear_attention`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_programs
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from linear_cases import RECURRENCES, arguments, errors, with_gradients

from experiments import static_tpu_linear
from pallas_kernels import NormalizedState, dispatch, linear_attention
from pallas_kernels.linear import tpu, tpu_pairs
from pallas_kernels.linear.options import LOWEST, Inputs, Options
from pallas_kernels.linear.tpu_inverse import solved, unit_lower_inverse

jitted = jax.jit(with_gradients, static_argnums=(2, 3))
ONE = {"B": 1, "P": 1, "K": 1, "H": 1}


def by_leaf(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def bound(name, dtype):
    """Of the error of a result, or of a gradient ("d" and what it is by)."""
    if dtype == jnp.float32:
        return 1e-5 if name[0] == "d" else 1e-6
    if name in ("dlog_decay", "dbeta", "dinput_gate"):
        return 1e-2
    return 6e-3 if name[0] == "d" else 3e-3


def agree(recurrence, T, chunk, dtype=jnp.float32, params=True, **sizes):
    """The kernels' results agree with the recurrence's in float32."""
    arrays, named = arguments(recurrence, T, dtype=dtype, **sizes)
    with dispatch.interpreting(params):
        got = jitted(arrays, named, "pallas_tpu", chunk)
    wide = tuple(x.astype(jnp.float32) for x in arrays)
    found = errors(by_leaf(got), by_leaf(jitted(wide, named, "oracle")))
    assert all(error < bound(name, dtype) for name, error in found.items()), found
    for x, name in zip(arrays, "qkv", strict=True):
        assert (got["d" + name].shape, got["d" + name].dtype) == (x.shape, x.dtype)


def test_every_gate_and_state():
    """Documents, initial and restart states, two value heads for a key head, an open last chunk."""
    agree("mlstm", 20, 16, B=1, P=2, K=1, H=2, initial=True)


@pytest.mark.parametrize("strong", [0.1, 50])
def test_delta_rule_with_a_decay_for_each_dimension(strong):
    agree("kda", 20, 16, jnp.bfloat16, **ONE, initial=True, strong=strong)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_recurrence(recurrence, dtype):
    """Two tiles in a chunk, and two chunks; head dimensions that are no whole registers."""
    agree(recurrence, 300, 256, dtype, B=1, P=2, K=1, H=2, hk=40, hv=136, initial=True)


@pytest.mark.slow
@pytest.mark.parametrize("strong", [0.5, 3, 50])
@pytest.mark.parametrize("recurrence", ["gla", "kda"])
def test_decays_of_each_strength(recurrence, strong):
    """That need blocks of the whole tile, of `tpu_pairs.BLOCK` tokens, and of two."""
    sizes = {"B": 1, "P": 1, "K": 1, "H": 2, "strong": strong}
    decay = arguments(recurrence, 128, **sizes)[1]["log_decay"][0, 0]
    strength = jax.vmap(tpu_pairs.strengths, 1)(jnp.maximum(decay, LOWEST))
    is_mild = jnp.max(jnp.sum(strength, 1)) < tpu_pairs.MILD, jnp.max(strength) < tpu_pairs.MILD
    assert is_mild == {0.5: (True, True), 3: (False, True), 50: (False, False)}[strong]
    agree(recurrence, 128, 128, jnp.bfloat16, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["plain", "gated_delta_net"])
def test_no_documents_and_no_states(recurrence):
    agree(recurrence, 40, 32, documents=False, restart=False, K=2, H=2, B=1)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(1, 8), (2, 6), (3, 3)])
def test_heads_in_groups(heads):
    """More value heads of a key head than a step of the grid has, and numbers with odd factors."""
    K, H = heads
    agree("retention", 20, 16, B=1, P=1, K=K, H=H)


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["retention", "kda"])
def test_one_token(recurrence):
    agree(recurrence, 1, 64, documents=False, restart=False, **ONE)


@pytest.mark.slow
def test_an_initial_state_for_all_rows_is_read_by_index():
    """Its gradient is the sum over the rows."""
    arrays, named = arguments("retention", 20, documents=False, restart=False)
    named["initial_state"] = jnp.cos(jnp.arange(2.0 * 4 * 8 * 12)).reshape(2, 4, 8, 12)
    with dispatch.interpreting():
        got = jitted(arrays, named, "pallas_tpu", 16)
    found = errors(got, jitted(arrays, named, "oracle"))
    assert all(error < bound(name, jnp.float32) for name, error in found.items()), found


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["delta_net", "kda"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_correlated_keys(dtype, recurrence):
    """With betas up to 2 and hardly any decay, errors of one token are in all later ones."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.standard_normal((1, 1, 300, 1, *shape))
    k = normal(64) * 0.1 + random.standard_normal(64)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    arrays = tuple(jnp.asarray(x, dtype) for x in (normal(64), k, normal(64)))
    named = {"beta": jnp.asarray(2 * random.random((1, 1, 300, 1)), jnp.float32)}
    if recurrence == "kda":
        decay = -1e-3 * random.random((1, 1, 300, 1, 64))
        named["log_decay"] = jnp.asarray(decay, jnp.float32)
    with dispatch.interpreting():
        got = jitted(arrays, named, "pallas_tpu", 128)
    expected = jitted(tuple(x.astype(jnp.float32) for x in arrays), named, "oracle")
    found = errors(got, expected)
    assert max(found.values()) < (3e-5 if dtype == jnp.float32 else 6e-3), found


@pytest.mark.parametrize("narrow", ["float32", "bfloat16"])
def test_inverse(narrow):
    """Of a matrix of correlated keys, whose powers grow, and the derivative of a product with it;
    in parts of bfloat16 with the errors of 16 bits, which such a matrix lets grow; the derivative
    by the matrix with those of one operand of 8 bits."""
    random = np.random.default_rng(0)
    C = 64
    a = np.tril(2 * random.random((C, 1)) * (0.98 + 0.02 * random.random((C, C))), -1)
    y, g = random.standard_normal((2, C, C))

    def take(a, y):
        return solved(narrow, unit_lower_inverse(narrow, jax.lax.stop_gradient(a)), a, y)

    @jax.jit
    def both(*of_one_head):
        x, pull = jax.vjp(jax.vmap(take), *(x[None] for x in of_one_head[:2]))
        return x[0], *(x[0] for x in pull(of_one_head[2][None]))

    x, da, dy = both(*(jnp.asarray(x, jnp.float32) for x in (a, y, g)))
    inverse = np.linalg.inv(np.eye(C) + a)
    wanted = {"x": inverse @ y, "dy": inverse.T @ g}
    wanted["da"] = -wanted["dy"] @ wanted["x"].T
    found = errors({"x": x, "da": da, "dy": dy}, wanted)
    bounds = (
        {"x": 2e-4, "dy": 2e-4, "da": 2**-9} if narrow == "bfloat16" else dict.fromkeys(found, 2e-6)
    )
    assert all(error < bounds[name] for name, error in found.items()), found


@pytest.mark.slow
@pytest.mark.parametrize("recurrence", ["mlstm", "kda"])
def test_no_races_and_nothing_read_before_it_is_written(recurrence):
    """Memory is full of NaN until it is written, and reads out of bounds raise."""
    params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    agree(recurrence, 40, 16, params=params, B=1, P=2, K=1, H=2, initial=True)
    assert not interpret_pallas_call.races.races_found


def test_what_does_not_fit_is_refused():
    def call(message, dtype=jnp.bfloat16, chunk=64, **sizes):
        arrays, named = arguments("retention", 9, dtype=dtype, **sizes)
        with dispatch.interpreting(), pytest.raises(ValueError, match=message):
            linear_attention(*arrays, **named, implementation="pallas_tpu", chunk=chunk)

    call("float16: .* expects bfloat16 or float32", jnp.float16)
    call("head dimensions 8 and 264: .* expects at most 256", hv=264)
    call("chunk=8: .* expects at least 16", chunk=8)
    wide = shapes("retention", 2**15, 2**14, jnp.float32, **ONE | {"hk": 256, "hv": 256})
    assert "chunk=16384 does not fit" in tpu.unfit(*wide)


def shapes(recurrence, T, chunk, dtype=jnp.bfloat16, **sizes):
    """`Options`, and `Inputs` of such shapes."""
    arrays, named = arguments(recurrence, 1, dtype=dtype, initial=True, **sizes)
    longer = lambda x, axis: (*x.shape[:axis], T, *x.shape[axis + 1 :])
    state = lambda x: x if isinstance(x, tuple) else NormalizedState(x, None, None)
    arrays, gates = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(longer(x, 2), x.dtype),
        (arrays, {name: named.get(name) for name in ("log_decay", "beta", "input_gate")}),
    )
    inputs = Inputs(
        *arrays,
        **gates,
        documents=jax.ShapeDtypeStruct((arrays[0].shape[0], 1, T), jnp.int32),
        initial=state(named["initial_state"]),
        restart=None,
    )
    inputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), inputs)
    return Options(1.0, recurrence == "mlstm", chunk), inputs


def test_the_table_of_estimates(monkeypatch):
    """5 cycles of each token and head, of 32 heads of 4096 tokens."""
    monkeypatch.setattr(static_tpu_linear, "cycles_of", lambda step: 5.0)
    row, *_ = static_tpu_linear.table(targets=("v5e",), families=("retention",))
    assert row["microseconds"] == pytest.approx(5 * 2**17 / 1.5e3)
    assert row["mxu_floor"] == pytest.approx(2**17 * 4 * 2 * 128 * 128 / 197e12 * 1e6)
    states = 4 * 128 * 128 / tpu.CHUNK
    assert row["hbm_floor"] == pytest.approx(2**17 * (4 * 2 * 128 + states) / 819e9 * 1e6)
    assert row["ratio"] == pytest.approx(row["microseconds"] / row["hbm_floor"])


@pytest.fixture(scope="module")
def compiler():
    with tpu_programs.process() as process:
        yield lambda *a: process.submit(tpu_programs.compiled_linear, *a).result()


@pytest.mark.tpu_compile
def test_compiles_to_one_kernel_each_way(compiler):
    programs = compiler("v6e", *shapes("gated_delta_net", 300, 128, B=1, P=2, K=1, H=2, hk=64))
    assert [program[:2] for program in programs] == [(1, 0), (1, 0)]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("target", tpu_programs.TOPOLOGIES)
@pytest.mark.parametrize("recurrence", RECURRENCES)
def test_every_recurrence_compiles_for_every_target(compiler, recurrence, target):
    sizes = {"B": 1, "P": 2, "K": 2, "H": 4, "hk": 128, "hv": 256}
    for dtype, chunk in ((jnp.bfloat16, tpu.CHUNK), (jnp.float32, 128)):
        programs = compiler(target, *shapes(recurrence, 1000, chunk, dtype, **sizes))
        assert [program[:2] for program in programs] == [(1, 0), (1, 0)]


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("recurrence", ["retention", "mlstm", "gated_delta_net", "kda"])
def test_less_memory_than_without_kernels(compiler, recurrence):
    sizes = {"B": 2, "P": 1, "K": 4, "H": 4, "hk": 128, "hv": 128}
    ours = compiler("v5e", *shapes(recurrence, 4096, tpu.CHUNK, **sizes))
    others = compiler("v5e", *shapes(recurrence, 4096, 64, **sizes), "xla")
    own, other = (sum(program.temporary for program in both) for both in (ours, others))
    assert 2 * own < other, (ours, others)
