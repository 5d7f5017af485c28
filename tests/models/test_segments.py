"""Descriptions of text that forks and joins, against rules written out for every pair of tokens."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from random_models import SMALL, forward, make_model

from models.segments import NO_TOKEN, Rules, Segment, ancestors, lay_out, read_again, trie
from pallas_kernels import masks
from sharding.settings import InputError


def text(count, *after, first=0):
    return Segment(tuple(range(first, first + count)), after)


def random_description(rng, count) -> list[Segment]:
    """Segments of 0 to 4 tokens that go on, branch off and join at random."""
    segments = []
    for number in range(count):
        most = min(number, int(rng.integers(1, 4)))
        after = rng.choice(number, int(rng.integers(0, most + 1)), replace=False) if number else []
        tokens = rng.integers(0, 50, rng.integers(0, 5) if number else 2)
        segments.append(Segment(tuple(map(int, tokens)), tuple(map(int, after))))
    return segments


def reaches(segments, later, earlier) -> bool:
    """Whether `later` comes after `earlier`, by walking back."""
    return any(o == earlier or reaches(segments, o, earlier) for o in segments[later].after)


@pytest.mark.parametrize("seed", range(8))
def test_a_token_sees_its_own_segment_and_all_that_it_comes_after(seed):
    segments = random_description(np.random.default_rng(seed), 9)
    layout = lay_out(segments)
    T = len(layout.ids)
    seen = np.asarray(masks.dense(layout.mask, T, T))
    for t, s in itertools.product(range(T), range(T)):
        a, b = layout.segments[t], layout.segments[s]
        expected = s <= t if a == b else reaches(segments, a, b)
        assert seen[t, s] == expected, (t, s)


def test_multiverse_paths_start_together_and_the_conclusion_after_the_longest():
    # "<Parallel>..</Goal>" 0-2, paths of 2 and 4 from 3 on, "<Conclusion>" from 7 on.
    segments = [text(3), text(2, 0), text(4, 0), text(2, 1, 2)]
    layout = lay_out(segments)
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert layout.longest_chain == 3 + 4 + 2
    seen = np.asarray(masks.dense(layout.mask, 11, 11))
    assert not seen[5:9, 3:5].any()
    assert seen[9:, :9].all()


def test_parathinker_flattened_positions_are_places():
    segments = [text(3), text(2, 0), text(4, 0), text(2, 1, 2)]
    assert lay_out(segments, Rules("flat")).positions.tolist() == list(range(11))


def test_a_concatenated_join_counts_what_it_sees():
    segments = [text(3), text(2, 0), text(4, 0), text(2, 1, 2), text(1, 3)]
    positions = lay_out(segments, Rules(join="concatenated")).positions
    assert positions[9:].tolist() == [9, 10, 11]
    # After a join by the largest position, going on and counting what is seen differ.
    assert lay_out(segments).positions[11] == 9
    assert lay_out(segments, Rules("depth")).positions[11] == 11


def test_nested_forks_by_hand():
    # 0 forks to 1 and 2; 1 forks to 3 and 4, joined by 5; 5 and 2 are joined by 6.
    segments = [
        text(2), text(1, 0), text(3, 0), text(1, 1), text(2, 1), text(1, 3, 4), text(1, 5, 2),
    ]  # fmt: skip
    layout = lay_out(segments)
    by_segment = [layout.positions[layout.segments == i].tolist() for i in range(7)]
    assert by_segment == [[0, 1], [2], [2, 3, 4], [3], [3, 4], [5], [6]]
    assert layout.longest_chain == 2 + 1 + 2 + 1 + 1


def test_depth_first_trees_are_those_of_masks_tree():
    segments = trie([(1, 2, 3, 4), (1, 2, 5), (1, 2, 5, 6), (7, 8), (1, 9)])
    layout = lay_out(segments, Rules("depth"))
    T = len(layout.ids)
    assert layout.ids.tolist() == [1, 2, 3, 4, 5, 6, 9, 7, 8]
    assert layout.before.tolist() == [NO_TOKEN, 0, 1, 2, 1, 4, 0, NO_TOKEN, 7]
    tree = masks.tree(layout.before)
    np.testing.assert_array_equal(masks.dense(layout.mask, T, T), masks.dense(tree, T, T))
    depth = [0, 1, 2, 3, 2, 3, 1, 0, 1]
    assert layout.positions.tolist() == depth


def test_every_unit_of_a_trie_is_a_way_from_its_beginning():
    rng = np.random.default_rng(0)
    units = [tuple(map(int, rng.integers(0, 3, rng.integers(1, 8)))) for _ in range(12)]
    layout = lay_out(trie(units), Rules("depth"))
    ways = set()
    for place in range(len(layout.ids)):
        way, at = [], place
        while at != NO_TOKEN:
            way.append(int(layout.ids[at]))
            at = layout.before[at]
        ways.add(tuple(reversed(way)))
    beginnings = {unit[:n] for unit in units for n in range(1, len(unit) + 1)}
    assert ways == beginnings
    assert len(layout.ids) == len(beginnings)


def test_the_loss_of_a_trie_is_that_of_its_units_each_token_once():
    rng = np.random.default_rng(1)
    config = dataclasses.replace(SMALL, streams=2)
    model = make_model(config)
    start = tuple(map(int, rng.integers(3, 31, 3)))
    units = [(*start, *map(int, rng.integers(0, 3, rng.integers(1, 8)))) for _ in range(6)]
    alone = {}
    for unit in units:
        row = np.zeros((1, 10), np.int32)
        row[0, : len(unit)] = unit
        logits = jax.nn.log_softmax(forward(model, row)[0])
        for place in range(1, len(unit)):
            alone[unit[: place + 1]] = -logits[place - 1, unit[place]]
    layout = lay_out(trie(units))
    logits = forward(model, layout.ids[None], positions=layout.positions[None], mask=layout.mask)[0]
    losses = -jax.nn.log_softmax(logits)[layout.before, layout.ids]
    total = np.sum(np.where(layout.before == NO_TOKEN, 0, losses))
    assert len(alone) < sum(len(unit) - 1 for unit in units)
    # The same float32 sums in another order, of some 30 terms.
    np.testing.assert_allclose(total, sum(alone.values()), rtol=1e-5)


def test_a_join_that_reads_again_sees_the_threads_in_a_line():
    segments = [text(2), text(1, 0, first=10), text(2, 0, first=20), text(1, 1, 2, first=30)]
    again = read_again(segments)
    line = [s.tokens for s in again]
    assert line == [(0, 1), (10,), (20, 21), (20, 21), (30,)]
    assert [s.after for s in again] == [(), (0,), (0,), (1,), (3,)]
    layout = lay_out(segments, Rules("depth", sees="text"))
    assert layout.positions.tolist() == [0, 1, 2, 2, 3, 3, 4, 5]
    seen = np.asarray(masks.dense(layout.mask, 8, 8))
    # The second thread sees the first where it is read again, not where it was written.
    assert seen[5, 2]
    assert not seen[3, 2]
    assert not seen[7, 3]
    assert lay_out(segments, Rules("flat", sees="text")).positions.tolist() == list(range(8))


@pytest.mark.parametrize("seed", range(6))
def test_read_again_every_token_sees_the_tokens_that_it_came_after(seed):
    segments = random_description(np.random.default_rng(seed), 7)
    again = read_again(segments)
    assert all(len(segment.after) <= 1 for segment in again)
    lines = [
        sorted([again[o].tokens for o in before] + [again[i].tokens])
        for i, before in enumerate(ancestors(again))
    ]
    for number, before in enumerate(ancestors(segments)):
        assert sorted([segments[o].tokens for o in before] + [segments[number].tokens]) in lines


def test_one_segment_is_a_plain_sequence():
    for rules in (Rules(), Rules("depth", "concatenated"), Rules("flat"), Rules(sees="text")):
        layout = lay_out([text(5)], rules)
        assert layout.positions.tolist() == [0, 1, 2, 3, 4]
        assert layout.before.tolist() == [NO_TOKEN, 0, 1, 2, 3]
        assert layout.longest_chain == 5
        np.testing.assert_array_equal(masks.dense(layout.mask, 5, 5), np.tri(5, dtype=bool))


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([text(1), text(1, 0, 5)], "segment 1 joins 5: expected a number from 0 to 0"),
        ([text(1), text(1, 1)], "segment 1 comes after 1: expected"),
        ([text(1, -1)], "segment 0 comes after -1"),
        ([text(1), text(1, 0, 0)], "segment 1 joins 0, 0: expected each once"),
        ([Segment(())], "a description without a token"),
        ([], "a description without a token"),
    ],
)
def test_bad_descriptions(segments, message):
    with pytest.raises(InputError, match=message):
        lay_out(segments)


def test_bad_rules_and_units():
    with pytest.raises(InputError, match="branch='deep': expected one of shared, depth, flat"):
        Rules("deep")
    with pytest.raises(InputError, match="unit 1 is empty"):
        trie([(1,), ()])
