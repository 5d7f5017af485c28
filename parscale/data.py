"""What training and evaluation read: a corpus, tokenised, split, packed into rows, in batches."""

import array
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from tqdm import tqdm

from parscale import corpora, packing, prepared, tokenizers
from parscale.config import DataConfig
from parscale.packing import Batch, MemoryTokens, Rows
from parscale.tokenizers import Tokenizer
from sharding.settings import InputError

# One thread keeps ahead of the device; a batch is about a millisecond of work.
_READ_OPTIONS = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """Both sides of a corpus as rows, and what a result has to record of them."""

    train: Rows
    held_out: Rows
    tokenizer: Tokenizer
    corpus_hash: str  # SHA-256 over names and contents of all documents
    train_documents: int
    train_tokens: int
    train_bytes: int
    held_out_documents: int
    held_out_tokens: int
    held_out_bytes: int

    @property
    def bytes_per_token(self) -> float:
        """Mean bytes of UTF-8 in a held-out token."""
        return self.held_out_bytes / self.held_out_tokens

    def bits_per_byte(self, loss: float) -> float:
        """Bits per byte of held-out text for a mean loss per held-out token, in nats."""
        return loss / math.log(2) / self.bytes_per_token


def open_data(config: DataConfig, vocab_size: int) -> Data:
    """Reads a corpus, or opens a prepared folder.

    Args:
      config: which corpus, tokenizer, length of rows and split.
      vocab_size: the model's; more than the tokenizer has is padding.

    Raises:
      InputError: corpus, tokenizer, vocabulary and configuration do not fit, or the corpus is
        smaller than one batch.
    """
    tokenizer = _tokenizer(config, vocab_size)
    if prepared.is_prepared(config.corpus):
        data = _open_prepared(config, tokenizer)
    else:
        data = _read(config.corpus, tokenizer, config.length, config.held_out)
    if len(data.train) < config.batch:
        raise InputError(
            f"corpus {config.corpus}: {data.train_tokens} tokens to train on make "
            f"{len(data.train)} rows of {config.length}, fewer than one batch of {config.batch}; "
            "give more text, or a smaller batch or length"
        )
    if not len(data.held_out):
        raise InputError(
            f"corpus {config.corpus}: the held-out documents have {data.held_out_tokens} tokens, "
            "too few to predict one; give more text, or a larger held_out"
        )
    return data


def open_files(spec: str, config: DataConfig, vocab_size: int) -> Data:
    """Reads text of which every document is held out, for evaluation alone.

    Args:
      spec: as for `corpora.find`; takes the place of `config.corpus`.
      config: which tokenizer and length of rows.
      vocab_size: the model's.

    Raises:
      InputError: as `open_data`, or fewer than two tokens.
    """
    data = _read(spec, _tokenizer(config, vocab_size), config.length, None)
    if not len(data.held_out):
        raise InputError(f"{spec}: {data.held_out_tokens} tokens are too few to predict one")
    return data


def train_batches(
    data: Data, config: DataConfig, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator[Batch]:
    """Endless batches of training rows, shuffled anew in each epoch.

    The order is global: the batch of a step holds the same rows whatever the number of hosts, of
    which each gets its contiguous part. The iterator's state is the step, equal on all hosts, so
    a run may go on with another number of hosts.

    Args:
      data: as `open_data` returns it.
      config: batch size (over all hosts) and seed.
      process_index: this host.
      process_count: all hosts.

    Returns:
      An iterator with `get_state` and `set_state` (a dict for JSON) over batches as
      `packing.Rows.take` gives them.

    Raises:
      InputError: the batch does not divide over the hosts, or the seed is out of range.
    """
    if not 0 <= config.seed < 2**32:
        raise InputError(f"data.seed={config.seed}: expected 0 to {2**32 - 1}")
    part = _part(config.batch, process_index, process_count)
    order = grain.MapDataset.range(len(data.train)).seed(config.seed).shuffle().repeat()
    batches = order.batch(config.batch).map(lambda rows: data.train.take(rows[part]))
    return iter(batches.to_iter_dataset(_READ_OPTIONS))


def held_out_batches(
    data: Data, batch: int, most_rows: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Batches of held-out rows, in order.

    Args:
      data: as `open_data` returns it.
      batch: rows in a batch, over all hosts; the last one is filled with rows of padding (row -1).
      most_rows: take at most so many rows, evenly spaced; 0 takes all.
      process_index: this host, which gets its contiguous part of each batch.
      process_count: all hosts.

    Raises:
      InputError: the batch does not divide over the hosts.
    """
    part = _part(batch, process_index, process_count)
    rows = np.arange(len(data.held_out))
    if 0 < most_rows < len(rows):
        rows = np.arange(most_rows) * len(rows) // most_rows
    rows = np.pad(rows, (0, -len(rows) % batch), constant_values=-1)
    return (data.held_out.take(group[part]) for group in rows.reshape(-1, batch))


def _part(batch: int, process_index: int, process_count: int) -> slice:
    if batch % process_count:
        raise InputError(
            f"data.batch={batch} does not divide over {process_count} hosts; give a multiple"
        )
    size = batch // process_count
    return slice(process_index * size, (process_index + 1) * size)


def _tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
    tokenizer = tokenizers.load(config.tokenizer)
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"model.vocab_size={vocab_size}, but tokenizer {config.tokenizer} has "
            f"{tokenizer.vocab_size} tokens; give --config.model.vocab_size={tokenizer.vocab_size} "
            "or more"
        )
    return tokenizer


class _Side:
    """Gathers the documents of one side in memory."""

    def __init__(self, dtype: np.dtype):
        self.dtype = dtype
        self.ids: list[np.ndarray] = []
        self.lengths = array.array("q")
        self.bytes = 0

    def append(self, ids: np.ndarray, text_bytes: int) -> None:
        self.ids.append(ids.astype(self.dtype))
        self.lengths.append(len(ids))
        self.bytes += text_bytes

    def tokens(self) -> MemoryTokens:
        flat = np.concatenate([np.zeros(0, self.dtype), *self.ids])
        return MemoryTokens(flat, packing.offsets_of(np.frombuffer(self.lengths, np.int64)))


def _read(spec: str, tokenizer: Tokenizer, length: int, held_out: float | None) -> Data:
    """A corpus in memory; a `held_out` of None keeps all documents from training."""
    corpus = corpora.find(spec)
    split = corpora.Split(spec, held_out)
    dtype = packing.token_dtype(tokenizer.vocab_size)
    train, other = _Side(dtype), _Side(dtype)
    # The bar appears only where reading takes long enough to wonder.
    with tqdm(
        desc=f"reading {spec}", total=corpus.disk_bytes, unit="B", unit_scale=True, delay=2
    ) as bar:
        read = ((document, document.text) for document in corpora.documents(corpus, bar.update))
        for document, ids in tokenizers.encode_stream(tokenizer, read):
            side = other if split.is_held_out(document) else train
            side.append(ids, len(document.data))
    corpus_hash = split.finish()
    train_tokens, other_tokens = train.tokens(), other.tokens()
    return Data(
        train=Rows(train_tokens, length, keep_partial=False),
        held_out=Rows(other_tokens, length, keep_partial=True),
        tokenizer=tokenizer,
        corpus_hash=corpus_hash,
        train_documents=len(train.lengths),
        train_tokens=len(train_tokens.tokens),
        train_bytes=train.bytes,
        held_out_documents=len(other.lengths),
        held_out_tokens=len(other_tokens.tokens),
        held_out_bytes=other.bytes,
    )


def _open_prepared(config: DataConfig, tokenizer: Tokenizer) -> Data:
    folder = config.corpus
    metadata = prepared.read_metadata(folder)
    if metadata.tokenizer != tokenizer.fingerprint:
        own = "bytes" if metadata.tokenizer == "bytes" else f"{folder}/{prepared.TOKENIZER}"
        raise InputError(
            f"corpus {folder} was prepared with tokenizer {metadata.tokenizer}, but data.tokenizer="
            f"{config.tokenizer} is {tokenizer.fingerprint}; give --config.data.tokenizer={own}"
        )
    share = metadata.held_out_share
    if share != config.held_out:
        raise InputError(
            f"corpus {folder} was prepared with held_out={share}, but data.held_out="
            f"{config.held_out}; give --config.data.held_out={share} or prepare it again"
        )
    train, held_out = prepared.read_tokens(folder, metadata)
    return Data(
        train=Rows(train, config.length, keep_partial=False),
        held_out=Rows(held_out, config.length, keep_partial=True),
        tokenizer=tokenizer,
        corpus_hash=metadata.corpus_hash,
        **_counts("train", metadata.train),
        **_counts("held_out", metadata.held_out),
    )


def _counts(name: str, side: prepared.Side) -> dict[str, Any]:
    return {f"{name}_{what}": getattr(side, what) for what in ("documents", "tokens", "bytes")}
