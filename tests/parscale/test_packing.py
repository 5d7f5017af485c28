import numpy as np
import pytest

from parscale.packing import MemoryTokens, Rows, offsets_of, token_dtype


def make(lengths, length, keep_partial, seed=0):
    tokens = np.random.default_rng(seed).integers(1, 256, sum(lengths)).astype(np.uint8)
    return Rows(MemoryTokens(tokens, offsets_of(np.array(lengths))), length, keep_partial)


def slow_row(rows, lengths, row):
    """One token at a time, with a label (document, place in it) for each."""
    labels = [(d, i) for d, n in enumerate(lengths) for i in range(n)]
    tokens, T = rows.tokens.tokens.tolist(), rows.length
    out = {"ids": [], "targets": [], "segment_ids": [], "positions": [], "mask": []}
    segment, position = 0, 0
    for t in range(row * T, row * T + T):
        inside, after = t < len(tokens), t + 1 < len(tokens)
        if inside:
            new = t == row * T or labels[t][1] == 0
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
        out["ids"].append(tokens[t] if inside else 0)
        out["targets"].append(tokens[t + 1] if after else 0)
        out["segment_ids"].append(segment if inside else 0)
        out["positions"].append(position if inside else 0)
        out["mask"].append(float(after and labels[t][0] == labels[t + 1][0]))
    return out | {"row": row}


CASES = [[100], [1] * 40, [3, 0, 0, 5, 1, 60, 2, 2], [8, 8, 8, 8], [7, 9, 8, 1], [33], [32], [2]]


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("length", [2, 8, 50])
def test_rows_equal_those_cut_one_token_at_a_time(lengths, length):
    rows = make(lengths, length, keep_partial=True)
    for row in range(len(rows)):
        found = rows[row]
        for name, values in slow_row(rows, lengths, row).items():
            np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("lengths", CASES)
@pytest.mark.parametrize("length", [2, 8, 50])
def test_every_token_but_a_documents_first_is_a_target_once(lengths, length):
    whole = make(lengths, length, keep_partial=True)
    batch = whole.take(np.arange(len(whole)))
    assert batch["mask"].sum() == sum(max(n - 1, 0) for n in lengths)
    first = np.zeros(sum(lengths), bool)
    first[whole.tokens.offsets[:-1]] = True
    np.testing.assert_array_equal(batch["targets"][batch["mask"] > 0], whole.tokens.tokens[~first])

    training = make(lengths, length, keep_partial=False)
    assert len(training) == (sum(lengths) - 1) // length
    assert (training.take(np.arange(len(training)))["segment_ids"] > 0).all()


def test_types_and_shapes():
    rows = make([20, 30], 8, keep_partial=False)
    batch = rows.take(np.array([3, 0]))
    types = {name: (values.shape, str(values.dtype)) for name, values in batch.items()}
    ints = {name: ((2, 8), "int32") for name in ("ids", "targets", "segment_ids", "positions")}
    assert types == ints | {"mask": ((2, 8), "float32"), "row": ((2,), "int32")}
    assert {name: values.shape for name, values in rows[0].items()} == {
        name: shape[1:] for name, (shape, _) in types.items()
    }


def test_a_padding_row_is_empty():
    batch = make([20, 30], 8, keep_partial=True).take(np.array([0, -1]))
    for name in ("ids", "targets", "segment_ids", "positions", "mask"):
        assert not batch[name][1].any()
    assert batch["row"].tolist() == [0, -1]


def test_rows_end_and_an_empty_stream_has_none():
    rows = make([20], 8, keep_partial=True)
    assert len(rows) == 3
    for row in (-1, 3):
        with pytest.raises(IndexError):
            rows[row]
    for lengths in ([], [1]):
        assert len(make(lengths, 8, keep_partial=True)) == 0


def test_small_types_hold_every_id():
    assert [str(token_dtype(n)) for n in (1, 256, 257, 65536, 65537)] == [
        "uint8", "uint8", "uint16", "uint16", "uint32",
    ]  # fmt: skip
