"""Masks against their definition, written out pair by pair."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

from pallas_kernels import masks
from pallas_kernels.masks import blocks, picture

T = 24
DOCUMENTS = np.array([1] * 5 + [2] * 2 + [3] * 13 + [0] * 4)
PLACE = np.array([np.sum(DOCUMENTS[:t] == DOCUMENTS[t]) for t in range(T)])
ANSWERS = np.array([0, 0, 1, 1, 2, 0, 1] + [0] * 4 + [1] * 4 + [2] * 5 + [0] * 4)
# 0 (1 (2 3) 4) 5 (6 7 (8)) and a second root 9 with a long chain below it.
PARENTS = np.array([-1, 0, 1, 1, 0, -1, 5, 5, 7, -1, *range(9, 23)])
#           stem   fork 1: branch 1 with a fork of its own in it, branch 2;  fork 2 at once; after
FORKS = np.array([[0] * 3 + [1] * 11 + [2] * 6 + [0] * 4, [0] * 5 + [1] * 4 + [0] * 15])
BRANCHES = np.array(
    [[0] * 3 + [1] * 8 + [2] * 3 + [1] * 3 + [2] * 3 + [0] * 4, [0] * 5 + [1, 1, 2, 2] + [0] * 15]
)
SCALES = (1, 4, 9, 10)
SCALE_OF = np.repeat(np.arange(4), SCALES)
EYE = np.random.default_rng(0).random((T, T)) < 0.3


def ancestors(t):
    while t >= 0:
        yield t
        t = PARENTS[t]


def isolated(t, s):
    """Whether the two are in different branches of one fork."""
    return any(
        FORKS[level, t] == FORKS[level, s] > 0 and BRANCHES[level, t] != BRANCHES[level, s]
        for level in range(2)
    )


def same(t, s):
    return DOCUMENTS[t] == DOCUMENTS[s] > 0


LINEAR_BLOCKS = [(0, 0), (1, 0), (2, 2), (0, 1)]
PATTERNS = np.stack([np.ones((10, 10), bool), np.eye(10, dtype=bool)])

# name: the mask, and whether query t sees key s.
RULES = {
    "full": (masks.full(), lambda t, s: True),
    "causal": (masks.causal(), lambda t, s: s <= t),
    "window": (masks.sliding_window(T, 5), lambda t, s: 0 <= t - s < 5),
    "two_sided_window": (
        masks.sliding_window(T, 5, two_sided=True),
        lambda t, s: abs(t - s) < 5,
    ),
    "dilated_window": (masks.dilated_window(T, 4, 3), lambda t, s: t - s in (0, 3, 6, 9)),
    "global_and_window": (
        masks.global_and_window(T, 3, 5),
        lambda t, s: s <= t and (s < 3 or t - s < 5),
    ),
    "two_sided_global": (
        masks.global_and_window(T, 3, 5, two_sided=True),
        lambda t, s: s < 3 or t < 3 or abs(t - s) < 5,
    ),
    "first_keys": (masks.first_keys(T, 7), lambda t, s: s < 7),
    "prefix_lm": (masks.prefix_lm(T, 7), lambda t, s: s <= t or s < 7),
    "left_padding": (masks.left_padding(T, jnp.array(4)), lambda t, s: 4 <= s <= t),
    "same_document": (masks.same_document(DOCUMENTS), same),
    "packed": (masks.packed(DOCUMENTS), lambda t, s: s <= t and same(t, s)),
    "packed_prefix_lm": (
        masks.packed_prefix_lm(DOCUMENTS, PLACE < 3),
        lambda t, s: same(t, s) and (s <= t or PLACE[s] < 3),
    ),
    "packed_block_causal": (
        masks.packed_block_causal(DOCUMENTS, 4),
        lambda t, s: same(t, s) and PLACE[s] // 4 <= PLACE[t] // 4,
    ),
    "shared_question": (
        masks.shared_question(DOCUMENTS, ANSWERS),
        lambda t, s: same(t, s) and s <= t and ANSWERS[s] in (0, ANSWERS[t]),
    ),
    "causal_blockwise": (
        masks.causal_blockwise(DOCUMENTS),
        lambda t, s: s <= t and (same(t, s) or (DOCUMENTS[t] == 3 and DOCUMENTS[s] > 0)),
    ),
    "next_scale": (masks.next_scale(SCALES), lambda t, s: SCALE_OF[s] <= SCALE_OF[t]),
    "next_scale_diagonal": (
        masks.next_scale(SCALES, diagonal=True),
        lambda t, s: SCALE_OF[s] == SCALE_OF[t],
    ),
    "tree": (masks.tree(PARENTS), lambda t, s: s in ancestors(t)),
    "fork_join": (
        masks.fork_join(FORKS, BRANCHES),
        lambda t, s: s <= t and not isolated(t, s),
    ),
    "streams_shared": (
        masks.streams(3, 6, 6, shared=True),
        lambda t, s: s <= t and (s < 6 or s // 6 == t // 6),
    ),
    "streams_private": (
        masks.streams(3, 6, 2, shared=False),
        lambda t, s: s <= t and s // 8 == t // 8,
    ),
    "from_dense": (masks.from_dense(EYE), lambda t, s: bool(EYE[t, s])),
    "from_blocks": (
        masks.from_blocks(LINEAR_BLOCKS, T, 10),
        lambda t, s: (t // 10, s // 10) in LINEAR_BLOCKS,
    ),
    "from_patterns": (
        masks.from_blocks(LINEAR_BLOCKS, T, 10, patterns=PATTERNS, pattern_of=[1, 0, 1, 0]),
        lambda t, s: {(0, 0): t == s, (1, 0): True, (2, 2): t == s, (0, 1): True}.get(
            (t // 10, s // 10), False
        ),
    ),
}


def pairs(rule, queries=T, keys=T):
    return np.array([[rule(t, s) for s in range(keys)] for t in range(queries)], bool)


@pytest.mark.parametrize("name", RULES)
def test_definition(name):
    mask, rule = RULES[name]
    assert np.array_equal(masks.dense(mask, T, T), pairs(rule))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("causal", "same_document"),
        ("causal", "full"),
        ("packed", "window"),
        ("fork_join", "two_sided_global"),
        ("dilated_window", "packed"),
        ("from_dense", "tree"),
        ("causal", "first_keys"),
    ],
)
def test_and_or(one, other):
    (a, first), (b, second) = RULES[one], RULES[other]
    both = pairs(lambda t, s: first(t, s) and second(t, s))
    assert np.array_equal(masks.dense(a & b, T, T), both)
    assert np.array_equal(masks.dense(b & a, T, T), both)
    if a.dilation == b.dilation:
        either = pairs(lambda t, s: first(t, s) or second(t, s))
        assert np.array_equal(masks.dense(a | b, T, T), either)
        assert np.array_equal(masks.dense(b | a, T, T), either)


def test_masks_of_rows_combine_with_a_mask_for_all():
    rows = masks.packed(np.stack([DOCUMENTS, DOCUMENTS[::-1]]))
    window = masks.sliding_window(T, 3)
    for combined, op in ((rows & window, np.logical_and), (rows | window, np.logical_or)):
        visible = np.asarray(masks.dense(combined, T, T))
        expected = op(masks.dense(rows, T, T), masks.dense(window, T, T))
        assert np.array_equal(visible, expected)


def test_rows_may_differ():
    padding = jnp.array([0, 3])
    visible = np.asarray(masks.dense(masks.left_padding(5, padding), 5, 5))
    for row, pad in enumerate((0, 3)):
        rule = lambda t, s, pad=pad: pad <= s <= t
        assert np.array_equal(visible[row], pairs(rule, 5, 5))
    parents = jnp.array([[-1, 0, 1, 0], [-1, -1, 1, 2]])
    visible = np.asarray(masks.dense(masks.tree(parents), 4, 4))
    assert not visible[0, 3, 1]
    assert visible[1, 3, 1]


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


@pytest.mark.parametrize("sizes", [(7, 5), (5, 32)])
@pytest.mark.parametrize("name", RULES)
def test_kinds_of_blocks(name, sizes):
    """A block without a visible pair may be PARTIAL, but only where keys have several runs."""
    mask, rule = RULES[name]
    visible = pairs(rule)
    kinds = np.asarray(blocks.block_kinds(mask, T, T, *sizes))
    one_run = mask.intervals is None or mask.intervals.shape[-3] == 1
    for i, j in itertools.product(*map(range, kinds.shape)):
        rows = slice(i * sizes[0], (i + 1) * sizes[0])
        tile = visible[rows, j * sizes[1] : (j + 1) * sizes[1]]
        is_whole = tile.all() and (j + 1) * sizes[1] <= T
        if kinds[i, j] == blocks.FULL:
            assert is_whole
        elif kinds[i, j] == blocks.EMPTY:
            assert not tile.any()
        elif one_run and mask.dilation == 1 and mask.causal is False:
            assert tile.any()
            assert not is_whole


def test_blocks_of_plain_causal_are_exact():
    kinds = blocks.block_kinds(masks.causal(), 12, 12, 4, 4)
    assert isinstance(kinds, np.ndarray)
    assert np.array_equal(kinds, [[1, 0, 0], [2, 1, 0], [2, 2, 1]])


def random_kinds(lead=(3,)):
    return np.random.default_rng(1).integers(0, 3, (*lead, 5, 7)) * (np.arange(5) != 2)[:, None]


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_row_lists(array):
    kinds = random_kinds()
    lists = blocks.row_lists(array(kinds))
    for row, i in itertools.product(range(3), range(5)):
        count, full = int(lists.counts[row, i]), int(lists.full[row, i])
        listed = [int(j) for j in lists.columns[row, i, :count]]
        expected = [j for kind in (2, 1) for j in range(7) if kinds[row, i, j] == kind]
        assert listed == expected
        assert full == np.sum(kinds[row, i] == 2)
        assert list(lists.kinds[row, i, :count]) == [kinds[row, i, j] for j in expected]
        assert (np.asarray(lists.kinds[row, i, count:]) == blocks.EMPTY).all()
        if count:
            assert (np.asarray(lists.columns[row, i, count:]) == expected[-1]).all()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_tile_list(array):
    kinds = random_kinds()
    codes, count = blocks.tile_list(array(kinds))
    assert int(count) == max(np.sum(k > 0) + 1 for k in kinds)  # one row is empty
    for row in range(3):
        tiles = [blocks.decode(int(code), 7) for code in codes[row, : int(count)]]
        real = [tile for tile in tiles if tile.kind or tile.is_first]
        expected = [(i, j) for i, j in itertools.product(range(5), range(7)) if kinds[row, i, j]]
        assert [(t.row, t.column) for t in real if t.kind] == expected
        assert all(t.kind == kinds[row, t.row, t.column] for t in real if t.kind)
        assert [t.row for t in real if t.is_first] == list(range(5))
        assert [t.row for t in real if t.is_last] == list(range(5))
        assert [t.row for t in real if not t.kind] == [2]
        for tile in tiles[len(real) :]:
            assert (tile.row, tile.column) == (real[-1].row, real[-1].column)
            assert not tile.is_first
            assert not tile.is_last
            assert tile.kind == blocks.EMPTY


def test_lists_are_made_inside_jit_without_a_large_array():
    """32768 positions in rows of documents: no array of all pairs, one compilation for all."""
    length = 32768

    @jax.jit
    def lists(ids):
        kinds = blocks.block_kinds(masks.packed(ids), length, length, 128, 128)
        return blocks.row_lists(kinds)

    ids = [jnp.arange(length)[None] // size + 1 for size in (1000, 5000)]
    counts = [int(jnp.sum(lists(x).counts)) for x in ids]
    assert counts[0] < counts[1]
    assert lists._cache_size() == 1
    memory = lists.lower(ids[0]).compile().memory_analysis()
    assert memory.temp_size_in_bytes < length * length / 16


def test_picture(tmp_path, capsys):
    """The colours of the drawn square are those of the pairs, and the fraction is counted."""
    length, window = 64, 10
    path = tmp_path / "mask.png"
    live = masks.draw(masks.sliding_window(length, window), length, length, path, block=16)
    assert live == 7 / 16
    assert capsys.readouterr().out == "43.8% of the blocks of 16 x 16 are live\n"
    image = plt.imread(path)[..., :3]
    dark, white = (
        np.isclose(image, to_rgb(picture.COLORS[kind]), atol=0.01).all(-1) for kind in (2, 0)
    )
    rows, columns = np.nonzero(dark)
    square = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
    share = dark[square].sum() / (dark[square].sum() + white[square].sum())
    visible = np.mean(masks.dense(masks.sliding_window(length, window), length, length))
    assert abs(share - visible) < 0.02


def test_a_picture_of_a_long_mask_of_one_row(tmp_path):
    mask = masks.packed(jnp.stack([jnp.ones(5000, int), jnp.arange(5000) // 100 + 1]))
    fractions = [
        masks.draw(mask, 5000, 5000, tmp_path / "mask.png", row=row, block=100) for row in (0, 1)
    ]
    assert fractions == [51 / 100, 1 / 50]
    with pytest.raises(ValueError, match="row=2: expected 0 to 1"):
        masks.draw(mask, 5000, 5000, tmp_path / "mask.png", row=2)


def test_bad_input_is_refused():
    window = masks.sliding_window(T, 3)
    with pytest.raises(ValueError, match="one length"):
        window & masks.sliding_window(T + 1, 3)
    with pytest.raises(ValueError, match="dilations 1 and 2"):
        window | masks.dilated_window(T, 3, 2)
    with pytest.raises(ValueError, match="leading axes"):
        masks.packed(jnp.ones((3, T), int)) | masks.packed(jnp.ones((2, T), int))
    with pytest.raises(ValueError, match="parent before it"):
        masks.tree(jnp.array([-1, 2, 0]))
    with pytest.raises(ValueError, match="expected both"):
        masks.fork_join(jnp.ones(T, int), jnp.ones(T, int))
    with pytest.raises(ValueError, match=r"float32: expected integers"):
        masks.packed(jnp.ones(T))
    with pytest.raises(ValueError, match="a mask of 24 keys, expected 12"):
        blocks.block_kinds(window, 12, 12, 4, 4)
    with pytest.raises(ValueError, match="window=0"):
        masks.sliding_window(T, 0)
    with pytest.raises(ValueError, match="at most 4096"):
        masks.from_dense(np.broadcast_to(True, (5000, 5000)))
    with pytest.raises(ValueError, match="runs of queries, runs=2"):
        masks.from_dense(EYE, runs=2)
    with pytest.raises(ValueError, match="inside jit"):
        jax.jit(masks.from_dense)(jnp.asarray(EYE))
    with pytest.raises(ValueError, match="expected 0 to 2"):
        masks.from_blocks([(0, 3)], T, 10)
    with pytest.raises(ValueError, match="twice"):
        masks.from_blocks([(0, 1), (0, 1)], T, 10)
    with pytest.raises(ValueError, match="pattern_of has 2"):
        masks.from_blocks([(0, 1)], T, 10, patterns=PATTERNS, pattern_of=[2])
