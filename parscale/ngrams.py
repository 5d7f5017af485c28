"""Unigram, bigram and trigram byte models: what a language model has to beat."""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Float64, Int64

from parscale.packing import Batch, Tokens

BYTES = 256
_CHUNK = 4 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """How often each byte, pair and triple occurs, pairs and triples within one document."""

    unigram: Int64[np.ndarray, "V"]
    bigram: Int64[np.ndarray, "V V"]
    trigram: Int64[np.ndarray, "V V V"]


def count(tokens: Tokens) -> Counts:
    """Counts of a stream of bytes.

    Raises:
      ValueError: a token is not a byte.
    """
    sizes = (BYTES, BYTES**2, BYTES**3)
    totals = [np.zeros(size, np.int64) for size in sizes]
    end = int(tokens.offsets[-1])
    for start in range(0, end, _CHUNK):
        stop = min(start + _CHUNK, end)
        # Two bytes of the chunk before complete the pairs and triples at its start.
        lead = min(start, 2)
        code = tokens.span(start - lead, stop).astype(np.int64)
        if code.min() < 0 or code.max() >= BYTES:
            raise ValueError(f"byte models need tokens below {BYTES}, found {code.max()}")
        first = np.zeros(len(code), bool)
        here = tokens.offsets[:-1] - (start - lead)
        first[here[(here >= 0) & (here < len(code))]] = True
        single = code
        whole = np.ones(len(code), bool)
        for order, total in enumerate(totals):
            if order:
                # A gram is whole where none but its first byte begins a document.
                whole = whole[:-1] & ~first[order:]
                code = code[:-1] * BYTES + single[order:]
            new = np.arange(len(code)) + order >= lead
            total += np.bincount(code[whole & new], minlength=len(total))
    return Counts(totals[0], totals[1].reshape(BYTES, -1), totals[2].reshape(BYTES, BYTES, -1))


def bits_per_byte(counts: Counts, batches: Iterable[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Mean bits of the three models over the targets that `mask` counts.

    A model sees what a language model sees: the bytes before the target in its row and document;
    where there are too few, the next lower order answers. Smoothing is Witten and Bell's
    interpolation: after a context seen n times with d different successors the share d / (n + d)
    goes to the lower order, below the unigram to the uniform distribution (Witten and Bell 1991,
    method C).

    Args:
      counts: of the training bytes.
      batches: as `held_out_batches` gives them.

    Returns:
      bits per byte by name: unigram, bigram, trigram.

    Raises:
      ValueError: no target counts.
    """
    n3, d3 = counts.trigram.sum(-1), np.count_nonzero(counts.trigram, axis=-1)
    p1 = _interpolate(counts.unigram, np.full(BYTES, 1 / BYTES))
    p2 = _interpolate(counts.bigram, p1)
    bits, targets = np.zeros(3), 0
    for batch in batches:
        before, last, target = _contexts(batch)
        q1, q2 = p1[target], p2[last, target]
        # Dense trigram probabilities would be 128 MB; only those of the targets are wanted.
        n, d = n3[before, last], d3[before, last]
        q3 = (counts.trigram[before, last, target] + d * q2) / np.maximum(n + d, 1)
        q3 = np.where((before >= 0) & (n > 0), q3, q2)
        bits -= [np.log2(q).sum() for q in (q1, q2, q3)]
        targets += len(target)
    if not targets:
        raise ValueError("no byte to score: every target is masked")
    return dict(zip(("unigram", "bigram", "trigram"), (bits / targets).tolist(), strict=True))


def _contexts(batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The byte before the last one (-1: none in reach), the last one, and the target."""
    ids, scored = batch["ids"], batch["mask"] > 0
    before = np.full_like(ids, -1)
    before[:, 1:] = np.where(batch["positions"][:, 1:] > 0, ids[:, :-1], -1)
    return before[scored], ids[scored], batch["targets"][scored]


def _interpolate(
    counts: Int64[np.ndarray, "*contexts V"], lower: Float64[np.ndarray, "V"]
) -> Float64[np.ndarray, "*contexts V"]:
    n = counts.sum(-1, keepdims=True)
    d = np.count_nonzero(counts, axis=-1, keepdims=True)
    return np.where(n > 0, (counts + d * lower) / np.maximum(n + d, 1), lower)
