"""pLSTM on a line and on a grid against loops in NumPy, float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.linear.grid_gates import GridGates, diffusive_gates, directed_gates
from pallas_kernels.linear.plstm import plstm
from pallas_kernels.linear.plstm_2d import GridState, every_orientation, plstm_2d

B, H, hk, hv = 2, 2, 4, 3
slow = pytest.mark.slow


@pytest.fixture(autouse=True)
def double_precision():
    """And little optimization, since nearly all the time goes into compiling."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.enable_x64(True):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def ratio(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.sqrt(np.mean((got - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def draw(*shapes, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape) for shape in shapes]


def draw_gates(count, *shape, seed=1):
    """From -1 to 1, a tenth of them 0."""
    random = np.random.default_rng(seed)
    gates = random.uniform(-1.0, 1.0, (count, *shape))
    return [jnp.asarray(gate) for gate in gates * (random.random(gates.shape) > 0.1)]


def line(T):
    q, k, v, state = draw(*[(B, T, H, hk)] * 2, (B, T, H, hv), (B, H, hk, hv))
    return (q, k, v, *draw_gates(4, B, T, H)), state


def line_loop(arrays, state):
    q, k, v, source, transition, mark, direct = map(np.asarray, arrays)
    state, out = state.copy(), np.zeros(v.shape)
    for b, h, t in itertools.product(range(B), range(H), range(v.shape[1])):
        at = b, t, h
        out[at] = mark[at] * q[at] @ state[b, h] + direct[at] * (q[at] @ k[at]) * v[at]
        state[b, h] = transition[at] * state[b, h] + source[at] * np.outer(k[at], v[at])
    return out / np.sqrt(hk), state


on_line = jax.jit(plstm, static_argnames="chunk")


@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (11, 1), (11, 4), (11, 64)])
def test_line(T, chunk):
    arrays, state = line(T)
    for got, wanted in zip(
        on_line(*arrays, initial_state=state, chunk=chunk), line_loop(arrays, state), strict=True
    ):
        assert ratio(got, wanted) < 1e-12


def test_line_in_two_calls():
    arrays, state = line(11)
    out, end = on_line(*arrays, initial_state=state, chunk=4)
    first, middle = on_line(*(x[:, :5] for x in arrays), initial_state=state, chunk=4)
    second, last = on_line(*(x[:, 5:] for x in arrays), initial_state=middle, chunk=4)
    assert ratio(np.concatenate([first, second], 1), out) < 1e-12
    assert ratio(last, end) < 1e-12


def wave(x):
    return jnp.vdot(x, jnp.cos(jnp.arange(x.size)).reshape(x.shape))


@pytest.mark.parametrize("chunk", [pytest.param(1, marks=slow), 4])
def test_line_gradients(chunk):
    T = 6
    arrays, state = line(T)

    def loop(q, k, v, source, transition, mark, direct, state):
        outs = []
        for t in range(T):
            out = mark[:, t, :, None] * jnp.einsum("bhk,bhkv->bhv", q[:, t], state)
            score = direct[:, t] * jnp.sum(q[:, t] * k[:, t], -1)
            outs.append((out + score[..., None] * v[:, t]) / np.sqrt(hk))
            new = jnp.einsum("bh,bhk,bhv->bhkv", source[:, t], k[:, t], v[:, t])
            state = transition[:, t, :, None, None] * state + new
        return wave(jnp.stack(outs, 1)) + wave(state)

    def ours(*arrays):
        out, end = plstm(*arrays[:-1], initial_state=arrays[-1], chunk=chunk)
        return wave(out) + wave(end)

    places = tuple(range(8))
    got, wanted = (jax.jit(jax.grad(f, places))(*arrays, state) for f in (ours, loop))
    for one, other in zip(got, wanted, strict=True):
        assert ratio(one, other) < 1e-12


@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_line_of_narrow_types(dtype, limit):
    arrays, state = line(50)
    narrow = [jnp.asarray(x, dtype) for x in arrays]
    out, end = on_line(*narrow, initial_state=jnp.asarray(state, jnp.float32), chunk=16)
    exact = line_loop([np.asarray(x, np.float64) for x in narrow], state)
    assert (out.dtype, end.dtype) == (dtype, jnp.float32)
    assert ratio(out, exact[0]) < limit
    assert ratio(end, exact[1]) < 1e-6


def test_no_positions():
    arrays, state = line(0)
    out, end = plstm(*arrays, initial_state=state)
    assert out.shape == (B, 0, H, hv)
    np.testing.assert_array_equal(end, state)


def grid(Y, X):
    q, k, v = draw(*[(B, Y, X, H, hk)] * 2, (B, Y, X, H, hv))
    state = GridState(*draw((B, Y, H, hk, hv), (B, X, H, hk, hv), seed=2))
    return q, k, v, GridGates(*draw_gates(9, B, Y, X, H)), state


def grid_loop(q, k, v, gates, state):
    gates = GridGates(*map(np.asarray, gates))
    Y, X = v.shape[1:3]
    out, right, down = np.zeros(v.shape), state.right.copy(), state.down.copy()
    for b, h, y, x in itertools.product(range(B), range(H), range(Y), range(X)):
        at, left, up = (b, y, x, h), right[b, y, h].copy(), down[b, x, h].copy()
        token, score = np.outer(k[at], v[at]), q[at] @ k[at]
        read = gates.mark_left[at] * left + gates.mark_up[at] * up
        out[at] = q[at] @ read + gates.direct[at] * score * v[at]
        right[b, y, h] = (
            gates.right_from_left[at] * left
            + gates.right_from_up[at] * up
            + gates.source_right[at] * token
        )
        down[b, x, h] = (
            gates.down_from_left[at] * left
            + gates.down_from_up[at] * up
            + gates.source_down[at] * token
        )
    return out / np.sqrt(hk), GridState(right, down)


on_grid = jax.jit(plstm_2d, static_argnames="cell")


@pytest.mark.parametrize(
    ("Y", "X", "cell"),
    [
        (1, 1, 8),
        (3, 5, 1),
        (5, 3, 2),
        (6, 7, 8),
        pytest.param(9, 6, 4, marks=slow),
        pytest.param(16, 16, 16, marks=slow),
    ],
)
def test_grid(Y, X, cell):
    arrays = grid(Y, X)
    got = on_grid(*arrays[:4], initial_state=arrays[4], cell=cell)
    wanted = grid_loop(*arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert ratio(one, other) < 1e-12


def test_grid_of_one_row_is_a_line():
    q, k, v, gates, _ = grid(1, 13)
    out, end = on_grid(q, k, v, gates, cell=4)
    of_row = gates.source_right, gates.right_from_left, gates.mark_left, gates.direct
    # The mark of the upper edge reads zero, and nothing of what leaves downwards comes back.
    line = [np.asarray(x)[:, 0] for x in (q, k, v, *of_row)]
    wanted, state = line_loop(line, np.zeros((B, H, hk, hv)))
    assert ratio(out[:, 0], wanted) < 1e-12
    assert ratio(end.right[:, 0], state) < 1e-12


@slow
@pytest.mark.parametrize("cell", [1, 2, 4])
def test_grid_gradients(cell):
    Y, X = 3, 2
    arrays = grid(Y, X)

    def loop(q, k, v, gates, state):
        outs = np.empty((Y, X), object)
        right, down = (list(jnp.moveaxis(x, 1, 0)) for x in state)
        for y, x in itertools.product(range(Y), range(X)):
            at = GridGates(*(gate[:, y, x, :, None, None] for gate in gates))
            qs, ks, vs, left, up = q[:, y, x], k[:, y, x], v[:, y, x], right[y], down[x]
            token = ks[..., :, None] * vs[..., None, :]
            read = at.mark_left * left + at.mark_up * up + at.direct * token
            outs[y, x] = jnp.sum(qs[..., None] * read, -2) / np.sqrt(hk)
            right[y] = at.right_from_left * left + at.right_from_up * up + at.source_right * token
            down[x] = at.down_from_left * left + at.down_from_up * up + at.source_down * token
        out = jnp.stack([jnp.stack(list(row), 1) for row in outs], 1)
        return wave(out) + wave(jnp.stack(right, 1)) + wave(jnp.stack(down, 1))

    def ours(q, k, v, gates, state):
        out, end = plstm_2d(q, k, v, gates, initial_state=state, cell=cell)
        return wave(out) + wave(end.right) + wave(end.down)

    places = tuple(range(5))
    got, wanted = (jax.jit(jax.grad(f, places))(*arrays) for f in (ours, loop))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert ratio(one, other) < 1e-12


@slow
@pytest.mark.parametrize(("dtype", "limit"), [(jnp.float32, 1e-6), (jnp.bfloat16, 3e-3)])
def test_grid_of_narrow_types(dtype, limit):
    narrow = jax.tree.map(lambda x: jnp.asarray(x, dtype), grid(6, 7))
    out, end = on_grid(*narrow[:4], initial_state=narrow[4], cell=4)
    exact = grid_loop(*jax.tree.map(lambda x: np.asarray(x, np.float64), narrow))
    assert (out.dtype, end.right.dtype) == (dtype, jnp.float32)
    assert ratio(out, exact[0]) < limit
    assert ratio(end.down, exact[1].down) < 1e-6


def test_every_orientation():
    q, k, v, _, _ = grid(3, 4)
    gates = [GridGates(*draw_gates(9, B, 3, 4, H, seed=seed)) for seed in range(4)]
    nothing = GridState(np.zeros((B, 3, H, hk, hv)), np.zeros((B, 4, H, hk, hv)))
    wanted = 0
    for axes, own in zip(([], [2], [1], [1, 2]), gates, strict=True):
        flip = lambda x, axes=axes: np.flip(x, axes)
        out, _ = grid_loop(*map(flip, (q, k, v)), GridGates(*map(flip, own)), nothing)
        wanted = wanted + flip(out) / 4
    assert ratio(jax.jit(every_orientation)(q, k, v, gates), wanted) < 1e-12


SIDE = 64


def impulse(gates):
    """What one token in the second row and column adds to the output of every other node."""
    one = jnp.ones((SIDE, SIDE, 1, 1))
    k = jnp.zeros_like(one).at[1, 1].set(1.0)
    return np.asarray(on_grid(one, k, one, gates, cell=8)[0][..., 0, 0])


def test_directed_gates_carry_along_a_row():
    one = jnp.ones((SIDE, SIDE, 1))
    response = impulse(directed_gates(one, one, one, one, 0 * one))
    expected = np.zeros((SIDE, SIDE))
    expected[1, 2:] = 1.0
    np.testing.assert_array_equal(response, expected)


def test_directed_gates_do_not_grow():
    share = jnp.asarray(np.random.default_rng(0).random((SIDE, SIDE, 1)))
    one = jnp.ones_like(share)
    response = impulse(directed_gates(share, one, one, one, 0 * one))
    # What travels is divided: all that crosses a diagonal is what was put in.
    for d in range(1, SIDE - 2):
        assert np.trace(response[::-1], d + 3 - SIDE) == pytest.approx(1.0)


@pytest.mark.parametrize("chirality", ["right", pytest.param("left", marks=slow)])
def test_diffusive_gates_do_not_grow(chirality):
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (3, SIDE, SIDE, 1))
    right, down, turn = map(jnp.asarray, signs)
    one = jnp.ones_like(right)
    gates = diffusive_gates(one, one, right, down, turn, one, one, 0 * one, chirality)
    response = impulse(gates)
    assert np.abs(response).max() == 1.0  # there is one path to every node
    q, k, v = draw(*[(SIDE, SIDE, 1, 8)] * 3)
    unit = k / np.linalg.norm(k, axis=-1, keepdims=True)
    out, end = on_grid(q, unit, v, gates, cell=8)
    assert np.all(np.isfinite(out))
    # Tokens of norm 3 or so add up at random: their number's square root, not a power of 64.
    assert max(np.linalg.norm(x, axis=(-1, -2)).max() for x in end) < 3 * 3 * SIDE
    free = gates._replace(right_from_up=one, down_from_left=one, right_from_left=one)
    assert np.abs(impulse(free._replace(down_from_up=one))).max() > 1e30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((B, 4, H, hk + 1))}, r"expected q, k \[..., T, H, hk\]"),
        ({"v": jnp.zeros((B, 5, H, hv))}, r"expected q, k \[..., T, H, hk\]"),
        ({"q": jnp.zeros((B, 4, H, hk), jnp.int32)}, "q.dtype is int32"),
        ({"mark": jnp.zeros((B, 4))}, r"mark \(2, 4\): expected \(2, 4, 2\)"),
        ({"chunk": 48}, "chunk=48: expected a power of 2"),
        ({"initial_state": jnp.zeros((H, hk, hv))}, r"expected \(2, 2, 4, 3\)"),
    ],
)
def test_bad_arguments_on_a_line(change, message):
    names = "q", "k", "v", "source", "transition", "mark", "direct"
    arguments = dict(zip(names, line(4)[0], strict=True)) | change
    with pytest.raises(ValueError, match=message):
        plstm(**arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": jnp.zeros((B, 2, H, hk))}, r"expected q, k \[..., Y, X, H, hk\]"),
        ({"gates": GridGates(*[jnp.zeros((B, 2, 3))] * 9)}, "source_right"),
        ({"cell": 0}, "cell=0: expected a power of 2"),
        ({"initial_state": GridState(jnp.zeros(1), jnp.zeros(1))}, "expected a GridState"),
    ],
)
def test_bad_arguments_on_a_grid(change, message):
    arguments = dict(zip(("q", "k", "v", "gates"), grid(2, 3), strict=False)) | change
    with pytest.raises(ValueError, match=message):
        plstm_2d(**arguments)


def test_bad_orientations():
    q, k, v, gates, _ = grid(2, 2)
    with pytest.raises(ValueError, match="2 sets of gates: expected 4"):
        every_orientation(q, k, v, [gates] * 2)


def test_bad_chirality():
    with pytest.raises(ValueError, match="chirality='up'"):
        diffusive_gates(*[jnp.ones((2, 2, 1))] * 8, chirality="up")
