import collections
import math

import numpy as np
import pytest

from parscale import ngrams
from parscale.packing import MemoryTokens, Rows, offsets_of

TRAIN = [b"the cat sat on the mat", b"a", b"", b"the dog sat", b"on and on and on", b"zz"]
HELD_OUT = [b"the cat and the dog", b"xylophone", b"q", b"on the mat sat a cat"]


def tokens_of(documents):
    flat = np.frombuffer(b"".join(documents), np.uint8)
    return MemoryTokens(flat, offsets_of(np.array([len(d) for d in documents])))


def slow_probability(successors, context, byte):
    """Witten-Bell interpolation over dictionaries, by recursion on the length of the context."""
    lower = slow_probability(successors, context[1:], byte) if context else 1 / 256
    seen = successors.get(context)
    if not seen:
        return lower
    return (seen[byte] + len(seen) * lower) / (sum(seen.values()) + len(seen))


def slow_count(train):
    successors = collections.defaultdict(collections.Counter)
    for document in train:
        for i, byte in enumerate(document):
            for order in range(min(i, 2) + 1):
                successors[document[i - order : i]][byte] += 1
    return successors


def slow_bits(train, held_out, length):
    successors = slow_count(train)
    stream = [(d, i) for d, document in enumerate(held_out) for i in range(len(document))]
    bits, targets = [0.0] * 3, 0
    for t, (d, i) in enumerate(stream):
        if i == 0:
            continue
        reach = min(i, (t - 1) % length + 1)  # bytes of this row and document before the target
        targets += 1
        for order in range(3):
            context = held_out[d][i - min(order, reach) : i]
            bits[order] -= math.log2(slow_probability(successors, context, held_out[d][i]))
    return [b / targets for b in bits]


@pytest.mark.parametrize("length", [2, 5, 64])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_bits_equal_those_of_dictionaries(monkeypatch, length, chunk):
    monkeypatch.setattr(ngrams, "_CHUNK", chunk)
    rows = Rows(tokens_of(HELD_OUT), length, keep_partial=True)
    batches = [rows.take(np.array([row, -1])) for row in range(len(rows))]
    found = ngrams.bits_per_byte(ngrams.count(tokens_of(TRAIN)), batches)
    assert list(found) == ["unigram", "bigram", "trigram"]
    # Both are float64 sums of the same few dozen logarithms.
    np.testing.assert_allclose(list(found.values()), slow_bits(TRAIN, HELD_OUT, length), rtol=1e-12)


@pytest.mark.parametrize("context", [b"", b"t", b"th", b"zz", b"zq", b"\0\0"])
def test_the_smoothing_is_a_distribution(context):
    successors = slow_count(TRAIN)
    total = sum(slow_probability(successors, context, byte) for byte in range(256))
    assert total == pytest.approx(1, abs=1e-12)


def test_counts_stay_within_documents():
    counts = ngrams.count(tokens_of([b"ab", b"cd", b"abc"]))
    assert counts.unigram.sum() == 7
    assert counts.bigram.sum() == 4
    assert counts.bigram[ord("a"), ord("b")] == 2
    assert counts.bigram[ord("b"), ord("c")] == 1
    assert counts.trigram.sum() == counts.trigram[ord("a"), ord("b"), ord("c")] == 1


def test_only_bytes_are_counted_and_only_targets_scored():
    wide = MemoryTokens(np.array([1, 256]), np.array([0, 2]))
    with pytest.raises(ValueError, match="below 256, found 256"):
        ngrams.count(wide)
    counts = ngrams.count(tokens_of(TRAIN))
    rows = Rows(tokens_of(HELD_OUT), 8, keep_partial=True)
    with pytest.raises(ValueError, match="every target is masked"):
        ngrams.bits_per_byte(counts, [rows.take(np.array([-1]))])
