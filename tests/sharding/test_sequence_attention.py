"""Attention over the sequence axis, by every scheme, against the dense op on one device.

Relative RMS errors of outputs and all gradients, float32: 1e-6 is some ten roundings.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequence_cases import errors, on_mesh, spec

from pallas_kernels import attention, masks
from pallas_kernels.masks import Mask
from pallas_kernels.masks.examples import EXAMPLES, documents, example, forks
from sharding.sequence.attention import sequence_attention

B, P, H, K, M, h = 2, 2, 4, 4, 3, 8
SCHEMES = ("gather", "heads", "ring")
OPTIONS = {"soft_cap": 3.0}


def arrays(T, dtype=np.float32):
    """q, k, v and a prefix."""
    random = np.random.default_rng(0)
    shapes = {"q": (B, P, T, H, h), "k": (B, P, T, K, h), "v": (B, P, T, K, h)}
    shapes |= {"prefix_k": (P, K, M, h), "prefix_v": (P, K, M, h)}
    return {name: jnp.asarray(random.standard_normal(s), dtype) for name, s in shapes.items()}


def op(function, options, x, mask):
    return function(x["q"], x["k"], x["v"], mask, prefix=(x["prefix_k"], x["prefix_v"]), **options)


@functools.cache
def results(scheme, axes, options=()):
    """A compiled function of arrays and mask; `scheme` None: on one device."""
    function = attention
    if scheme is not None:
        function = functools.partial(sequence_attention, q_spec=spec(), kv_spec=spec())

    @jax.jit
    def run(arrays, mask):
        out, pull = jax.vjp(lambda x: op(function, dict(options), x, mask), arrays)
        return out, pull(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))[0]

    def call(arrays, mask):
        if scheme is None:
            return run(arrays, mask)
        with on_mesh(attention=scheme, **dict(axes)):
            return run(arrays, mask)

    return call


def assert_equal(scheme, axes, T, masks, options=()):
    for name, mask in masks.items():
        expected = results(None, (), options)(arrays(T), mask)
        got = results(scheme, tuple(axes.items()), options)(arrays(T), mask)
        found = errors(got, expected)
        assert max(found.values()) < 1e-6, (name, found)


def in_two_runs(mask, T):
    """The same mask as intervals `[B, 2, 2, T]`, so that one program serves many."""
    if mask.intervals is None:
        return mask & Mask(jnp.tile(jnp.array([[[0], [T]], [[0], [0]]], jnp.int32), (B, 1, 1, T)))
    runs = mask.intervals
    runs = jnp.broadcast_to(runs, (B, *runs.shape[-3:]))
    runs = jnp.pad(runs, [(0, 0), (0, 2 - runs.shape[1]), (0, 0), (0, 0)])
    return Mask(runs, mask.causal, mask.dilation)


def causal_masks(T):
    """Of one structure: documents, a window that crosses the borders of parts, a fork and join."""
    inside, branches = forks(T)
    kinds = {
        "causal": masks.causal(),
        "packed": masks.packed(documents(B, T)),
        "window": masks.sliding_window(T, T // 3),
        "fork and join": masks.fork_join(inside[:1], branches[:1]),
    }
    return {name: in_two_runs(mask, T) for name, mask in kinds.items()}


def other_masks(T):
    prefix = masks.packed_prefix_lm(documents(B, T), jnp.arange(T) % 7 < 3)
    kinds = {"prefix-LM": masks.prefix_lm(T, jnp.array([T // 3, T - 1])), "packed": prefix}
    return {name: in_two_runs(mask, T) for name, mask in kinds.items()}


@pytest.mark.parametrize(("scheme", "parts"), [("gather", 4), ("heads", 2), ("ring", 4)])
def test_causal_masks(little_optimization, scheme, parts):
    assert_equal(scheme, {"sequence": parts}, 40, causal_masks(40))


@pytest.mark.parametrize(
    ("scheme", "parts"), [pytest.param("gather", 2, marks=pytest.mark.slow), ("ring", 2)]
)
def test_other_masks(little_optimization, scheme, parts):
    assert_equal(scheme, {"sequence": parts}, 40, other_masks(40))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "parts"),
    [
        (scheme, parts)
        for scheme in SCHEMES
        for parts in (2, 3, 4, 8)
        if scheme != "heads" or H % parts == 0
    ],
)
def test_number_of_devices(little_optimization, scheme, parts):
    for kinds in (causal_masks(48), other_masks(48), {"full": masks.full()}):
        assert_equal(scheme, {"sequence": parts}, 48, kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_kind_of_mask(little_optimization, scheme, name):
    assert_equal(scheme, {"sequence": 4}, 144, {name: example(name, B, 144)})


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_dilation_that_does_not_divide_a_part(little_optimization, scheme):
    """The places of queries and keys in their parts then differ modulo the dilation."""
    window = masks.dilated_window(40, 6, 3)
    kinds = {"window": window, "no window": Mask(causal=True, dilation=3), "all": Mask(dilation=3)}
    for name, mask in kinds.items():
        assert_equal(scheme, {"sequence": 4}, 40, {name: mask})


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_a_mesh_of_four_axes_with_a_cap(little_optimization, scheme):
    """Rows, streams and heads are divided too; tiles of the flash form, which starts at 128."""
    axes = {"stream": 2, "sequence": 2, "tensor": 2}
    options = tuple(OPTIONS.items())
    assert_equal(scheme, axes, 520, causal_masks(520), options)
    assert_equal(scheme, {"data": 2, "sequence": 4}, 520, other_masks(520), options)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_bfloat16(little_optimization, scheme):
    """Parts are rounded before they are merged: about two roundings of 8 bits."""
    mask = causal_masks(40)["packed"]
    expected = results(None, ())(arrays(40), mask)
    narrow = arrays(40, jnp.bfloat16)
    got = results(scheme, (("sequence", 4),))(narrow, mask)
    assert max(errors(got, expected).values()) < 1e-2
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}


def test_what_moves(little_optimization):
    """One device gathers keys and values; all-to-alls move heads; the ring gathers nothing."""
    moves = {
        "gather": ({"all-gather"}, {"all-to-all", "collective-permute"}),
        "heads": ({"all-to-all"}, {"all-gather", "collective-permute"}),
        "ring": ({"collective-permute"}, {"all-gather", "all-to-all"}),
    }
    for scheme, (some, none) in moves.items():
        with on_mesh(attention=scheme, sequence=2) as mesh:
            place = lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=jax.NamedSharding(mesh, spec())
            )
            q, k, v = (place(arrays(8)[name]) for name in "qkv")
            text = (
                jax.jit(
                    lambda q, k, v: sequence_attention(
                        q, k, v, masks.causal(), q_spec=spec(), kv_spec=spec()
                    )
                )
                .lower(q, k, v)
                .compile()
                .as_text()
            )
        assert all(f" {name}(" in text for name in some), scheme
        assert not any(f" {name}(" in text for name in none), scheme
