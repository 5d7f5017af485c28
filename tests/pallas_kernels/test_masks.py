"""Masks against their definition, written out pair by pair."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import masks


def pairs(rule, queries, keys):
    return np.array([[rule(t, s) for s in range(keys)] for t in range(queries)])


def test_full_and_causal():
    assert np.array_equal(masks.dense(masks.full(), 3, 5), np.ones((3, 5), bool))
    expected = pairs(lambda t, s: s <= t, 6, 6)
    assert np.array_equal(masks.dense(masks.causal(), 6, 6), expected)


def test_packed_documents_see_only_themselves_and_padding_nothing():
    ids = np.array([[1, 1, 2, 2, 2, 3, 0, 0], [4, 4, 4, 4, 4, 4, 4, 4]])
    dense = masks.dense(masks.packed(jnp.asarray(ids)), 8, 8)
    for row, visible in zip(ids, np.asarray(dense), strict=True):
        rule = lambda t, s, row=row: bool(s <= t and row[s] == row[t] and row[s] > 0)
        assert np.array_equal(visible, pairs(rule, 8, 8))


def test_equal_ids_apart_are_different_documents():
    visible = np.asarray(masks.dense(masks.packed(jnp.array([1, 1, 2, 1])), 4, 4))
    assert not visible[3, 0]
    assert visible[3, 3]


def test_cached_sees_the_slots_up_to_its_own_position():
    positions = np.array([[0, 1, 2], [4, 5, 6]])
    dense = masks.dense(masks.cached(jnp.asarray(positions), 9), 3, 9)
    for row, visible in zip(positions, np.asarray(dense), strict=True):
        assert np.array_equal(visible, pairs(lambda t, s, row=row: bool(s <= row[t]), 3, 9))


def test_several_runs_of_one_key():
    intervals = jnp.array([[[0, 2], [1, 3]], [[3, 3], [4, 3]]])  # [R=2, 2, S=2]
    visible = np.asarray(masks.dense(masks.Mask(intervals), 4, 2))
    assert np.array_equal(visible[:, 0], [True, False, False, True])
    assert np.array_equal(visible[:, 1], [False, False, True, False])
