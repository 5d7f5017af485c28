"""Rows of equal length cut from the concatenation of all documents."""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Int, Int64

Batch = dict[str, np.ndarray]


class Tokens(Protocol):
    """The tokens of many documents, one after the other."""

    @property
    def offsets(self) -> Int64[np.ndarray, " documents+1"]:
        """Where each document begins; the last entry is the number of all tokens."""

    def span(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        """Tokens `start` to `stop`, across documents."""


@dataclasses.dataclass(frozen=True, eq=False)
class MemoryTokens:
    """Tokens in one flat array."""

    tokens: Int[np.ndarray, " n"]
    offsets: Int64[np.ndarray, " documents+1"]

    def span(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        return self.tokens[start:stop]


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest unsigned type that holds every id."""
    return np.min_scalar_type(max(vocab_size - 1, 1))


def offsets_of(lengths: Int[np.ndarray, " documents"]) -> Int64[np.ndarray, " documents+1"]:
    """Offsets of documents of these lengths; those without a token are left out."""
    lengths = np.asarray(lengths, np.int64)
    return np.concatenate([[0], np.cumsum(lengths[lengths > 0])]).astype(np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Random access to rows of T tokens and the token that follows each.

    Row r takes tokens [r T, r T + T] of the stream, so that neighbours share one token and every
    token but the stream's first is a target once. `keep_partial` says what becomes of the last
    row where the stream does not fill it: kept and padded, or dropped.
    """

    tokens: Tokens
    length: int
    keep_partial: bool

    def __len__(self) -> int:
        targets = max(int(self.tokens.offsets[-1]) - 1, 0)
        return -(-targets // self.length) if self.keep_partial else targets // self.length

    def __getitem__(self, row: int) -> Batch:
        """The batch of one row, without the batch axis."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return {name: values[0] for name, values in self.take(np.array([row])).items()}

    def take(self, rows: Int[np.ndarray, "B"]) -> Batch:
        """A batch of rows.

        Args:
          rows: which; -1 is a row of padding.

        Returns:
          ids int32 [B, T]; targets int32 [B, T], the token after each; segment_ids int32 [B, T],
          documents counted from 1 within the row, 0 is padding; positions int32 [B, T], from 0
          where the row or a document begins; mask float32 [B, T], 1 where the target is of the
          same document; row int32 [B].
        """
        rows = np.asarray(rows, np.int64)
        offsets, T = self.tokens.offsets, self.length
        end = int(offsets[-1])
        starts = np.where(rows < 0, end, rows * T)
        stream = np.zeros((len(rows), T + 1), np.int32)
        for values, start in zip(stream, starts.tolist(), strict=True):
            stop = min(start + T + 1, end)
            if start < stop:
                values[: stop - start] = self.tokens.span(start, stop)
        at = starts[:, None] + np.arange(T + 1)
        document = np.searchsorted(offsets, at, side="right") - 1
        begins = np.maximum(offsets[document], starts[:, None])
        inside = (at < end)[:, :-1]
        document_before, document_after = document[:, :-1], document[:, 1:]
        same = inside & (document_before == document_after)
        segments = document_before - document[:, :1] + 1
        return {
            "ids": stream[:, :-1].copy(),
            "targets": stream[:, 1:].copy(),
            "segment_ids": np.where(inside, segments, 0).astype(np.int32),
            "positions": np.where(inside, (at - begins)[:, :-1], 0).astype(np.int32),
            "mask": same.astype(np.float32),
            "row": rows.astype(np.int32),
        }
