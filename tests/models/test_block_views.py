"""Attention over views of blocks, against NumPy in float64."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.block_cache import BlockPool, Parts, View, attend_view
from models.segments import Segment, lay_out
from pallas_kernels import masks
from sharding.mesh import MeshConfig, make_mesh

pytestmark = pytest.mark.usefixtures("little_optimization")

THETA = 10000.0
SLOTS = 4  # of a block
BLOCKS = 6  # of each stream of a row
MESH = {"data": 2, "stream": 2, "tensor": 2}


def rotated(x, positions):
    """`x` `[..., h]`, rotated by positions `[...]`; its halves pair up."""
    half = x.shape[-1] // 2
    angles = np.asarray(positions)[..., None] * THETA ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def expected_attention(case) -> np.ndarray:
    """Attention of each query on its own, in float64, with queries turned back instead of keys."""
    q, k, v, pool, view, mask, prefix = case
    (B, P, T, H, h), (N, K, slots, _) = q.shape, pool.k.shape
    held = [np.float64(x).swapaxes(1, 2).reshape(N * slots, K, h) for x in (pool.k, pool.v)]
    for x, new in zip(held, (k, v), strict=True):
        x[view.places.reshape(-1)] = new.reshape(-1, K, h)
    own = np.asarray(masks.dense(mask, T, T))
    own = np.broadcast_to(own.reshape(*own.shape[:-2], *[1] * (4 - own.ndim), T, T), (B, P, T, T))
    n, empty = view.blocks.shape[-1], np.zeros_like(view.blocks)
    shifts = empty if view.shifts is None else view.shifts
    parts = Parts(empty, np.ones((B, 1)), np.ones((B, 1))) if view.parts is None else view.parts
    out = np.zeros(q.shape)
    for b, p, t, head in np.ndindex(B, P, T, H):
        kv_head, query = head // (H // K), np.float64(q[b, p, t, head]) * h**-0.5
        scores, values, labels = [], [], []

        def see(query, key, value, part, to=(scores, values, labels)):
            for list_, x in zip(to, (query @ key, value, part), strict=True):
                list_.append(x)

        for i in range(n):
            for slot in range(slots):
                place = view.blocks[b, p, i] * slots + slot
                if slot < view.counts[b, p, i] or (T == 1 and place == view.places[b, p, 0]):
                    key, value = (x[place, kv_head] for x in held)
                    turned = rotated(query, -shifts[b, p, i])
                    see(turned, key, value, parts.of_block[b, p, i])
        if T > 1:
            for s in np.flatnonzero(own[b, p, t]):
                see(query, k[b, p, s, kv_head], v[b, p, s, kv_head], 0)
        if prefix is not None:
            for key, value in zip(*(x[p, kv_head] for x in prefix), strict=True):
                see(query, key, value, 0)
        scores, values, labels = map(np.array, (scores, values, labels))
        outs, weights = [], []
        for part, (temperature, factor) in enumerate(zip(parts[1][b], parts[2][b], strict=True)):
            of_part = labels == part
            if of_part.any():
                powers = np.exp(scores[of_part] / temperature)
                outs.append(powers @ values[of_part] / powers.sum())
                weights.append(factor * np.log(powers.sum()))
        weights = np.exp(weights)
        out[b, p, t, head] = weights @ outs / weights.sum()
    return out


def random_case(
    seed, length, *, prefix=False, shifts=False, parts=0, mask=None, apart=False, B=2, P=2
):
    """Arguments of `attend_view`: views that share blocks, of which some are seen in part.

    Each stream of each row has a range of `BLOCKS` blocks, in order, and writes to one of them; if
    they are `apart`, it sees no others.
    """
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    H, K, h, n, ranges = 4, 2, 8, 4, B * P
    first = BLOCKS * np.arange(ranges)
    own = first + 1
    others = np.setdiff1d(np.arange(ranges * BLOCKS), own)
    of_range = [others[others // BLOCKS == i] if apart else others for i in range(ranges)]
    seen = np.stack([rng.permutation(some)[: n - 1] for some in of_range])
    blocks = np.concatenate([seen, own[:, None]], 1).reshape(B, P, n)
    counts = rng.integers(1, SLOTS + 1, (B, P, n))
    counts[..., -1] = 0
    counts[:, 0, 1] = 0
    places = blocks[..., -1:] * SLOTS + rng.permutation(SLOTS)[:length]
    view = View(*(x.astype(np.int32) for x in (blocks, counts, places)))
    if shifts:
        moved = rng.integers(-30, 30, (B, P, n)).astype(np.int32)
        moved[..., -1] = 0
        view = dataclasses.replace(view, shifts=moved)
    if parts:
        of_block = rng.integers(0, parts, (B, P, n)).astype(np.int32)
        of_block[..., -1] = 0
        table = rng.uniform(0.5, 1.5, (2, B, parts)).astype(np.float32)
        view = dataclasses.replace(view, parts=Parts(of_block, *table))
    shape = (BLOCKS * ranges, K, SLOTS, h)
    return (
        draw(B, P, length, H, h), draw(B, P, length, K, h), draw(B, P, length, K, h),
        BlockPool(draw(*shape), draw(*shape)), view, mask or masks.causal(),
        (draw(P, K, 3, h), draw(P, K, 3, h)) if prefix else None,
    )  # fmt: skip


@jax.jit
def attended(case):
    return attend_view(*case, THETA)


def with_view(case, **changes):
    return (*case[:4], dataclasses.replace(case[4], **changes), *case[5:])


def assert_as_expected(found, case):
    # Sums of up to 20 products of float32.
    np.testing.assert_allclose(found, expected_attention(case), rtol=0, atol=1e-5)


FORK = lay_out([Segment((0,)), Segment((0,), (0,)), Segment((0,), (0,)), Segment((0,), (1, 2))])


@pytest.mark.parametrize("prefix", [False, True], ids=["", "prefix"])
@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {}),
        (4, {"mask": FORK.mask}),
        (1, {"shifts": True}),
        (4, {"shifts": True}),
        (1, {"parts": 3}),
        (4, {"parts": 2, "shifts": True, "mask": FORK.mask}),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else str(x),
)
def test_attention_to_a_view(length, options, prefix):
    case = random_case(length, length, prefix=prefix, **options)
    assert_as_expected(attended(case)[0], case)


def test_moved_keys_in_float64():
    with jax.enable_x64(True):
        wide = lambda x: x.astype(np.float64) if x.dtype == np.float32 else x
        case = jax.tree.map(wide, random_case(0, 1, prefix=True, shifts=True))
        found = attended(case)[0]
        np.testing.assert_allclose(found, expected_attention(case), rtol=0, atol=1e-10)


def test_temperatures_and_factors_of_1_are_one_attention():
    case = random_case(0, 1, parts=3)
    ones = np.ones((2, 3), np.float32)
    apart = attended(with_view(case, parts=Parts(case[4].parts.of_block, ones, ones)))[0]
    together = attended(with_view(case, parts=None))[0]
    np.testing.assert_allclose(apart, together, rtol=0, atol=1e-6)


def test_a_part_that_a_row_sees_nothing_of_counts_for_nothing():
    case = random_case(1, 1, parts=3, prefix=True)
    view = case[4]
    of_block = np.minimum(view.parts.of_block, 1)
    of_block[1] = 0
    factor = view.parts.factor.copy()
    factor[:, 2] = 0
    case = with_view(case, parts=view.parts._replace(of_block=of_block, factor=factor))
    assert_as_expected(attended(case)[0], case)


def test_parts_of_which_nothing_is_seen_are_zero():
    case = random_case(1, 1, parts=3)
    blocks, counts = case[4].blocks.copy(), case[4].counts.copy()
    blocks[0], counts[0] = 0, 0  # not even the token's own place
    factor = case[4].parts.factor.copy()
    factor[:, 1] = 0
    parts = case[4].parts._replace(factor=factor)
    case = with_view(case, blocks=blocks, counts=counts, parts=parts)

    def outputs(q, k, v):
        return attended((q, k, v, *case[3:]))[0]

    found, pull = jax.vjp(outputs, *case[:3])
    np.testing.assert_array_equal(found[0], 0)
    qkv, view = jax.tree.map(lambda x: x[1:], (case[:3], case[4]))
    assert_as_expected(found[1:], (*qkv, case[3], view, *case[5:]))
    for gradient in pull(jnp.ones_like(found)):
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[0], 0)


@pytest.mark.parametrize("length", [1, 4])
def test_tokens_of_other_rows_in_the_same_pass_are_seen(length):
    case = random_case(2, length)
    view = case[4]
    blocks, counts = view.blocks.copy(), view.counts.copy()
    blocks[0, :, 0], counts[0, :, 0] = view.blocks[1, :, -1], SLOTS
    case = with_view(case, blocks=blocks, counts=counts)
    assert_as_expected(attended(case)[0], case)


@pytest.mark.parametrize("length", [1, 4])
def test_what_is_not_seen_may_be_anything(length):
    case = random_case(3, length, prefix=True)
    k, v = case[3].k.copy(), case[3].v.copy()
    view = case[4]
    unseen = np.ones((len(k), SLOTS), bool)
    for block, count in zip(view.blocks.flat, view.counts.flat, strict=True):
        unseen[block, :count] = False
    for x in (k, v):
        x.swapaxes(1, 2)[unseen] = np.nan
    poisoned = (*case[:3], BlockPool(k, v), *case[4:])
    found, expected = (np.asarray(attended(x)[0]) for x in (poisoned, case))
    np.testing.assert_array_equal(found, expected)


def test_a_row_that_sees_nothing_is_zero():
    case = random_case(4, 1)
    nothing = {name: np.zeros_like(getattr(case[4], name)) for name in ("blocks", "counts")}
    # Only the place that it writes to, and of that no block in its view.
    found, pool = attended(with_view(case, **nothing))
    np.testing.assert_array_equal(found, 0)
    places = case[4].places.reshape(-1)
    written = np.asarray(pool.k)[places // SLOTS, :, places % SLOTS]
    np.testing.assert_array_equal(written, case[1].reshape(written.shape))


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ({"data": 2}, 2),
        ({"stream": 2}, 1),
        ({"tensor": 2}, 2),
        (MESH, 2),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
@pytest.mark.parametrize("length", [1, 4])
def test_a_mesh_attends_as_one_device_does(mesh, rows, length):
    own = np.stack([FORK.runs, np.broadcast_to([[0], [4]], FORK.runs.shape)])[:rows]
    mask = dataclasses.replace(FORK.mask, intervals=own.astype(np.int32)) if length > 1 else None
    case = random_case(
        5, length, prefix=True, shifts=True, parts=2 * (length > 1), mask=mask, apart=True, B=rows
    )
    devices = jax.devices()[: math.prod(mesh.values())]
    with jax.set_mesh(make_mesh(MeshConfig(**{"data": 1, **mesh}), devices)):
        found, pool = attended(case)
    assert_as_expected(found, case)
    for x, alone in zip(pool[:2], attended(case)[1][:2], strict=True):
        np.testing.assert_array_equal(x, alone)
