"""Aaren against prefix softmax in NumPy and against masked quadratic attention in JAX."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import attention, masks
from pallas_kernels.linear.aaren import AarenState, aaren, merge_parts

B, P, H, h, hv = 2, 3, 2, 8, 5

pytestmark = pytest.mark.usefixtures("little_optimization")


def inputs(T, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    shapes = (H, h), (B, P, T, H, h), (B, P, T, H, hv)
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def state(*lead, dtype=np.float32, seed=1):
    """A state that is not in the units of its own maximum, as a learned one may be."""
    random = np.random.default_rng(seed)
    maximum, total = random.standard_normal((*lead, H)), random.uniform(0.5, 2.0, (*lead, H))
    weighted = random.standard_normal((*lead, H, hv))
    return AarenState(*(jnp.asarray(x, dtype) for x in (maximum, total, weighted)))


def ratio(got, expected):
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.sqrt(np.mean((got - expected) ** 2)) / np.sqrt(np.mean(expected**2))


def naive(q, k, v, segment_ids=None, initial=None, restart=None):
    """Loops over every axis, float64: output, and the log-sum-exp and output of the last state."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    T = k.shape[2]
    ids = np.ones((B, T), int) if segment_ids is None else np.asarray(segment_ids)
    out, end_lse, end_out = np.zeros(v.shape), np.zeros((B, P, H)), np.zeros((B, P, H, hv))

    def extra(given, b, p, j):
        """Score and value of the one token that stands for a state."""
        if given is None:
            return np.zeros(0), np.zeros((0, hv))
        index = (b, p, j) if given.total.ndim == 3 else (p, j)
        maximum, total, weighted = (np.asarray(x, np.float64)[index] for x in given)
        return np.array([maximum + np.log(total)]), (weighted / total)[None]

    for b, p, j in itertools.product(range(B), range(P), range(H)):
        seen, last = [], None
        start = extra(restart if initial is None else initial, b, p, j)
        for t in range(T + 1):
            if t < T and ids[b, t] == 0:
                continue
            if t < T and last not in (None, ids[b, t]):
                seen, start = [], extra(restart, b, p, j)
            if t < T:
                seen, last = [*seen, t], ids[b, t]
            scores = np.concatenate([start[0], k[b, p, seen, j] @ q[j] / np.sqrt(h)])
            values = np.concatenate([start[1], v[b, p, seen, j]])
            top = scores.max()
            weights = np.exp(scores - top)
            result = weights @ values / weights.sum()
            if t < T:
                out[b, p, t, j] = result
            else:
                end_lse[b, p, j], end_out[b, p, j] = top + np.log(weights.sum()), result
    return out, end_lse, end_out


def described(end):
    return end.maximum + jnp.log(end.total), end.weighted / end.total[..., None]


run = jax.jit(aaren, static_argnames="chunk")
IDS = jnp.array([[0, 3, 3, 0, 3, 5, 5, 3, 0, 0, 2, 2, 2], [1, 1, 1, 1, 2, 3, 3, 0, 3, 3, 4, 4, 0]])


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("packed", "states"),
    [
        (False, "none"),
        (False, "initial"),
        (True, "none"),
        (True, "both"),
        pytest.param(False, "restart", marks=slow),
        pytest.param(True, "initial", marks=slow),
        pytest.param(True, "initial_by_row", marks=slow),
        pytest.param(True, "restart", marks=slow),
    ],
)
def test_prefix_softmax(packed, states):
    arrays = inputs(13)
    given = {
        "none": {},
        "initial": {"initial_state": state(P)},
        "initial_by_row": {"initial_state": state(B, P)},
        "restart": {"restart_state": state(P)},
        "both": {"initial_state": state(B, P), "restart_state": state(P, seed=2)},
    }[states]
    ids = IDS if packed else None
    out, end = run(*arrays, segment_ids=ids, chunk=4, **given)
    expected = naive(*arrays, ids, given.get("initial_state"), given.get("restart_state"))
    assert [x.dtype for x in (out, *end)] == [jnp.float32] * 4
    for got, wanted in zip((out, *described(end)), expected, strict=True):
        assert ratio(got, wanted) < 1e-6


@pytest.mark.parametrize(("T", "chunk"), [(1, 64), (5, 1), (100, 64)])
def test_lengths(T, chunk):
    arrays = inputs(T)
    out, end = run(*arrays, chunk=chunk)
    for got, wanted in zip((out, *described(end)), naive(*arrays), strict=True):
        assert ratio(got, wanted) < 1e-6


def test_no_tokens():
    q, k, v = inputs(0)
    out, end = aaren(q, k, v, initial_state=state(P))
    assert out.shape == v.shape
    for got, given in zip(end, state(P), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(given, (B, *given.shape)))


def test_double_precision():
    with jax.enable_x64(True):
        arrays = inputs(64, np.float64)
        out, end = run(*arrays, chunk=16, initial_state=state(P, dtype=np.float64))
        expected = naive(*arrays, initial=state(P, dtype=np.float64))
        for got, wanted in zip((out, *described(end)), expected, strict=True):
            assert ratio(got, wanted) < 1e-13


def test_bfloat16():
    arrays = inputs(64, jnp.bfloat16)
    out, end = run(*arrays)
    expected = naive(*arrays)
    assert out.dtype == jnp.bfloat16
    assert end.weighted.dtype == jnp.float32
    assert ratio(out, expected[0]) < 3e-3
    assert ratio(described(end)[1], expected[2]) < 1e-6


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_large_scores(size):
    q, k, v = inputs(13)
    # Scores are multiples of 1/8 near `size`, which float32 holds exactly.
    k = (jnp.round(8 * k) / 8).at[..., 0].add(size).at[..., 1:].set(0.0)
    q = jnp.zeros_like(q).at[:, 0].set(1.0)
    out, end = run(q, k, v, scale=1.0, chunk=4)
    for got, wanted in zip((out, *described(end)), naive(np.sqrt(h) * q, k, v), strict=True):
        assert ratio(got, wanted) < 1e-6


@pytest.mark.parametrize("packed", [pytest.param(False, marks=slow), True])
def test_two_calls_are_one(packed):
    q, k, v = inputs(12)
    restart = state(P)
    ids = IDS[:, :12] if packed else None
    whole, end = run(q, k, v, segment_ids=ids, restart_state=restart, chunk=4)
    carried, outs = AarenState(*(jnp.broadcast_to(x, (B, *x.shape)) for x in restart)), []
    for part in (slice(0, 6), slice(6, 12)):
        if part.start and packed:
            # Row 0 goes on with document 5, row 1 with document 3: neither begins anew.
            assert [IDS[0, 5], IDS[1, 5], IDS[0, 6], IDS[1, 6]] == [5, 3, 5, 3]
        out, carried = run(
            q, k[:, :, part], v[:, :, part], initial_state=carried, restart_state=restart,
            segment_ids=None if ids is None else ids[:, part], chunk=4,
        )  # fmt: skip
        outs.append(out)
    assert ratio(jnp.concatenate(outs, 2), whole) < 1e-6
    for got, wanted in zip(described(carried), described(end), strict=True):
        assert ratio(got, wanted) < 1e-6


def quadratic(q, k, v, ids, initial, restart):
    """By a mask and `jax.nn.softmax`: two more keys stand for the states."""
    T = k.shape[2]
    number = np.zeros((B, T), int)
    for b in range(B):
        last, count = None, 0
        for t in range(T):
            if ids[b, t]:
                count += last not in (None, ids[b, t])
                last = ids[b, t]
            number[b, t] = count
    real = np.asarray(ids) > 0
    sees = (number[:, :, None] == number[:, None]) & real[:, None] & np.tri(T, dtype=bool)
    sees = np.concatenate([sees, (number == 0)[..., None], (number > 0)[..., None]], -1)
    scores = jnp.einsum("hd,bpshd->bphs", q, k, precision="highest") / np.sqrt(h)
    scores = jnp.broadcast_to(scores[..., None, :], (B, P, H, T, T))
    values = [jnp.moveaxis(v, 3, 2)]
    for given in (initial, restart):
        column = jnp.broadcast_to(given.maximum + jnp.log(given.total), (B, P, H))[..., None, None]
        scores = jnp.concatenate([scores, jnp.broadcast_to(column, (B, P, H, T, 1))], -1)
        value = given.weighted / given.total[..., None]
        values.append(jnp.broadcast_to(value, (B, P, H, hv))[..., None, :])
    scores = jnp.where(sees[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, -1)
    values = jnp.concatenate(values, -2)
    out = jnp.einsum("bphts,bphsv->bpthv", weights, values, precision="highest")
    out = out * real[:, None, :, None, None]
    end = jax.nn.logsumexp(scores[..., -1, :], -1), weights[..., -1, :, None] * values
    return out, end[0], jnp.sum(end[1], -2)


def test_gradients():
    arrays = *inputs(13), state(B, P), state(P, seed=2)

    def loss(function, *arrays):
        results = function(*arrays)
        return sum(
            jnp.vdot(x, jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
            for x in results
        )

    def scan(q, k, v, initial, restart):
        out, end = aaren(
            q, k, v, segment_ids=IDS, initial_state=initial, restart_state=restart, chunk=4
        )
        return out, *described(end)

    places = tuple(range(5))
    by_mask = lambda *x: quadratic(*x[:3], np.asarray(IDS), *x[3:])
    got = jax.jit(jax.grad(lambda *x: loss(scan, *x), places))(*arrays)
    expected = jax.jit(jax.grad(lambda *x: loss(by_mask, *x), places))(*arrays)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert ratio(one, other) < 1e-5


def test_padding_may_hold_anything():
    q, k, v = inputs(13)
    padding = (IDS == 0)[:, None, :, None, None]
    spoiled = (jnp.where(padding, jnp.nan, x) for x in (k, v))

    @jax.jit
    def call(q, k, v):
        loss = lambda *x: jnp.sum(jnp.sin(aaren(*x, segment_ids=IDS, chunk=4)[0]))
        return aaren(q, k, v, segment_ids=IDS, chunk=4), jax.grad(loss, (0, 1, 2))(q, k, v)

    clean, dirty = call(q, k, v), call(q, *spoiled)
    for one, other in zip(jax.tree.leaves(clean), jax.tree.leaves(dirty), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.any(np.where(padding, clean[0][0], 0))
    assert np.all(np.any(np.asarray(clean[0][0]), -1) == (IDS != 0)[:, None, :, None])


def test_nothing_seen():
    q, k, v = inputs(4)
    out, end = run(q, k, v, segment_ids=jnp.zeros((B, 4), jnp.int32))
    assert not np.any(out)
    assert np.all(end.maximum == -np.inf)
    assert not np.any(end.total)
    assert not np.any(end.weighted)


EMPTY = AarenState(jnp.full((P, H), -jnp.inf), jnp.zeros((P, H)), jnp.zeros((P, H, hv)))


def test_merging_parts_without_keys():
    merge = jax.jit(merge_parts)
    full = state(P)
    # An attention that sees nothing has the total 1 that the mapping of its parts gives it.
    from_attention = EMPTY._replace(total=jnp.ones((P, H)))
    for empty in (EMPTY, from_attention):
        for pair in ((full, empty), (empty, full)):
            for got, wanted in zip(merge(*pair), full, strict=True):
                np.testing.assert_array_equal(got, wanted)
        for got, wanted in zip(merge(empty, empty), EMPTY, strict=True):
            np.testing.assert_array_equal(got, wanted)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradient(a, b):
        merged = merge_parts(a, b)
        return jnp.sum(merged.total) + jnp.sum(merged.weighted) + jnp.sum(jnp.exp(merged.maximum))

    for pair in ((full, EMPTY), (EMPTY, full), (EMPTY, EMPTY)):
        for one in jax.tree.leaves(gradient(*pair)):
            assert np.all(np.isfinite(one))
    of_full, _ = gradient(full, EMPTY)
    np.testing.assert_array_equal(of_full.weighted, jnp.ones((P, H, hv)))
    np.testing.assert_allclose(of_full.maximum, jnp.exp(full.maximum), rtol=1e-6)


def test_merging_is_associative():
    parts = [state(P, seed=seed) for seed in range(3)]
    left = merge_parts(merge_parts(*parts[:2]), parts[2])
    right = merge_parts(parts[0], merge_parts(*parts[1:]))
    for got, wanted in zip(described(left), described(right), strict=True):
        assert ratio(got, wanted) < 1e-6


def test_merging_parts_of_attention():
    """The first queries see no key of the second half."""
    T, heads, half = 12, 4, 5
    random = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(random.standard_normal((B, P, T, n, h)), np.float32) for n in (heads, 2, 2)
    )
    dense = np.tri(T, dtype=bool)

    def part(q, k, v, columns):
        mask = masks.from_dense(dense[:, columns])
        out, lse = attention(
            q, k[:, :, columns], v[:, :, columns], mask, return_lse=True, implementation="oracle"
        )
        return AarenState(lse, jnp.ones_like(lse), out)

    def merged(q, k, v):
        first, second = (part(q, k, v, s) for s in (slice(0, half), slice(half, T)))
        return described(merge_parts(first, second))

    def whole(q, k, v):
        return attention(q, k, v, masks.causal(), return_lse=True, implementation="oracle")[::-1]

    def run(function, *arrays):
        results, pull = jax.vjp(function, *arrays)
        return results, pull(tuple(jnp.cos(x) for x in results))

    run = jax.jit(run, static_argnums=0)
    (got, got_gradients), (wanted, wanted_gradients) = (run(f, q, k, v) for f in (merged, whole))
    for one, other in zip(got, wanted, strict=True):
        assert ratio(one, other) < 1e-6
    for one, other in zip(got_gradients, wanted_gradients, strict=True):
        assert ratio(one, other) < 1e-5


@pytest.mark.slow
def test_memory_is_linear():
    """Twice the positions take twice the temporary memory of a forward and backward pass."""

    def temporary(T):
        shapes = (H, h), (B, P, T, H, h), (B, P, T, H, hv)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        loss = lambda *x: jnp.sum(aaren(*x)[0])
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(1024) < 2.2 * temporary(512)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.zeros((H, h + 1))}, r"expected q \[H, h\]"),
        ({"v": jnp.zeros((B, P, 3, H, hv))}, r"expected q \[H, h\]"),
        ({"k": jnp.zeros((B, P, 4, H, h), jnp.int32)}, "k.dtype is int32"),
        ({"segment_ids": jnp.ones((B, 5), jnp.int32)}, r"segment_ids \(2, 5\)"),
        ({"segment_ids": jnp.ones((P, 4), jnp.int32)}, "from the left"),
        ({"segment_ids": jnp.ones((B, 4))}, "expected integers"),
        ({"initial_state": state(B)}, "initial_state of shapes"),
        ({"restart_state": state(B, P)}, "restart_state of shapes"),
        ({"restart_state": state(P)[:2]}, "expected an AarenState"),
        ({"chunk": 0}, "chunk=0: expected at least 1"),
    ],
)  # fmt: skip
def test_bad_arguments(change, message):
    arguments = dict(zip("qkv", inputs(4), strict=True)) | change
    with pytest.raises(ValueError, match=message):
        aaren(**arguments)
