"""Prepared folders: a corpus tokenised once, in ArrayRecord shards that rows are read from.

A folder holds `metadata.json`, `tokenizer.json` (but for bytes) and for each side of the split its
shards and `<side>_offsets.npy`, where its documents begin. A record is a fixed number of tokens of
the concatenated documents, so that a row costs one or two records however long its document is.
`metadata.json` appears last, by renaming `unfinished.json`, which was there from the start.
"""

import array
import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python import array_record_module
from jaxtyping import Int, Int64
from tqdm import tqdm

from parscale import corpora, packing, paths
from parscale.tokenizers import BPETokenizer, Tokenizer, encode_stream, train_bpe
from sharding.settings import InputError

METADATA = "metadata.json"
UNFINISHED = "unfinished.json"
TOKENIZER = "tokenizer.json"
SIDES = ("train", "held_out")
RECORD_TOKENS = 4096
SHARD_RECORDS = 1 << 16

_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the split, as it lies in the folder."""

    documents: int
    tokens: int
    bytes: int  # of UTF-8 text
    shards: dict[str, int]  # name and size in bytes of each file, in order


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What a prepared folder says of itself."""

    format: int
    corpus: str
    corpus_hash: str
    held_out_share: float
    tokenizer: str  # fingerprint
    dtype: str
    record_tokens: int
    shard_records: int
    train: Side
    held_out: Side


@dataclasses.dataclass(eq=False)
class StoredTokens:
    """Tokens in ArrayRecord shards (`packing.Tokens`); reading from several threads is safe."""

    paths: tuple[Path, ...]
    offsets: Int64[np.ndarray, " documents+1"]
    dtype: np.dtype
    record_tokens: int
    shard_records: int

    def __post_init__(self):
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()

    def span(self, start: int, stop: int) -> Int[np.ndarray, " n"]:
        size = self.record_tokens
        first, last = start // size, max(stop - 1, start) // size
        records = []
        for shard in range(first // self.shard_records, last // self.shard_records + 1):
            base = shard * self.shard_records
            wanted = range(max(first, base), min(last + 1, base + self.shard_records))
            records += self._reader(shard).read([record - base for record in wanted])
        tokens = np.frombuffer(b"".join(records), self.dtype)
        return tokens[start - first * size : stop - first * size]

    def _reader(self, shard: int) -> Any:
        with self._lock:
            if shard not in self._readers:
                self._readers[shard] = array_record_module.ArrayRecordReader(
                    str(self.paths[shard]),
                    options="readahead_buffer_size:0",
                    file_reader_buffer_size=32768,
                )
            return self._readers[shard]


def prepare(
    spec: str,
    tokenizer: Tokenizer,
    folder: str | Path,
    *,
    held_out: float = 0.05,
    record_tokens: int = RECORD_TOKENS,
    shard_records: int = SHARD_RECORDS,
) -> Metadata:
    """Tokenises a corpus into a new folder, showing progress on stderr.

    Args:
      spec: as for `corpora.find`.
      tokenizer: its tokenizer.json is copied into the folder.
      folder: made if missing; must be empty.
      held_out: share of the documents that training never sees.
      record_tokens: tokens in a record.
      shard_records: records in a file.

    Raises:
      InputError: the folder is not empty, or the corpus has a fault.
    """
    folder = Path(folder).expanduser()
    if is_prepared(spec):
        raise InputError(
            f"corpus {spec}: already a prepared folder; give the text it was made from"
        )
    _check_share(held_out)
    corpus = corpora.find(spec)
    check_empty(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / UNFINISHED).write_text("{}\n")
    if isinstance(tokenizer, BPETokenizer):
        tokenizer.save(folder / TOKENIZER)
    # Little-endian on every machine: folders are copied between them.
    dtype = packing.token_dtype(tokenizer.vocab_size).newbyteorder("<")
    split = corpora.Split(spec, held_out)
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(_SideWriter(folder, side, dtype, record_tokens, shard_records))
            for side in SIDES
        ]
        bar = stack.enter_context(
            tqdm(desc=f"preparing {spec}", total=corpus.disk_bytes, unit="B", unit_scale=True)
        )
        read = ((document, document.text) for document in corpora.documents(corpus, bar.update))
        for document, ids in encode_stream(tokenizer, read):
            writers[split.is_held_out(document)].append(ids, len(document.data))
        sides = [writer.finish() for writer in writers]
    metadata = Metadata(
        format=_FORMAT,
        corpus=spec,
        corpus_hash=split.finish(),
        held_out_share=held_out,
        tokenizer=tokenizer.fingerprint,
        dtype=dtype.str,
        record_tokens=record_tokens,
        shard_records=shard_records,
        train=sides[0],
        held_out=sides[1],
    )
    with (folder / UNFINISHED).open("w") as file:
        json.dump(dataclasses.asdict(metadata), file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / UNFINISHED, folder / METADATA)
    return metadata


def learn_tokenizer(spec: str, vocab_size: int, *, held_out: float = 0.05) -> BPETokenizer:
    """A byte-level BPE tokenizer learnt on the documents that training sees, with progress.

    Args:
      spec: as for `corpora.find`.
      vocab_size: tokens wanted, at least 256.
      held_out: share of the documents that is not looked at.

    Raises:
      InputError: the corpus has a fault, or the `tokenizers` library is missing.
    """
    _check_share(held_out)
    corpus = corpora.find(spec)
    with tqdm(
        desc=f"learning {vocab_size} tokens", total=corpus.disk_bytes, unit="B", unit_scale=True
    ) as bar:
        texts = (
            document.text
            for document in corpora.documents(corpus, bar.update)
            if document.place >= held_out
        )
        return train_bpe(texts, vocab_size)


def is_prepared(spec: str | Path) -> bool:
    """True for a folder that `prepare` has made, or has begun to make."""
    folder = Path(spec).expanduser()
    return (folder / UNFINISHED).is_file() or (
        (folder / METADATA).is_file() and any(folder.glob("*_offsets.npy"))
    )


def read_metadata(folder: str | Path) -> Metadata:
    """What a prepared folder says of itself.

    Raises:
      InputError: the preparation was interrupted, or the folder is damaged.
    """
    folder = Path(folder).expanduser()
    if (folder / UNFINISHED).is_file():
        raise InputError(
            f"{folder}: the preparation was interrupted or is still running; "
            "delete the folder and prepare it again"
        )
    try:
        fields = json.loads((folder / METADATA).read_text())
        if fields["format"] != _FORMAT:
            raise InputError(
                f"{folder / METADATA}: format {fields['format']}, expected {_FORMAT}; "
                "prepare the folder again"
            )
        for side in SIDES:
            fields[side] = Side(**fields[side])
        return Metadata(**fields)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{folder / METADATA}: damaged ({error}); prepare it again") from None


def read_tokens(folder: str | Path, metadata: Metadata) -> tuple[StoredTokens, StoredTokens]:
    """Tokens for training, and held-out tokens.

    Raises:
      InputError: a file is missing, or has not the size it had.
    """
    folder = Path(folder).expanduser()
    sides = []
    for name, side in zip(SIDES, (metadata.train, metadata.held_out), strict=True):
        for shard, size in side.shards.items():
            found = (folder / shard).stat().st_size if (folder / shard).is_file() else None
            if found != size:
                state = "missing" if found is None else f"{found} bytes, expected {size}"
                raise InputError(f"{folder / shard}: {state}; copy or prepare the folder again")
        offsets_path = folder / f"{name}_offsets.npy"
        try:
            offsets = np.load(offsets_path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{offsets_path}: {error}; prepare the folder again") from None
        if offsets.ndim != 1 or int(offsets[-1]) != side.tokens:
            raise InputError(f"{offsets_path}: damaged; copy or prepare the folder again")
        sides.append(
            StoredTokens(
                tuple(folder / shard for shard in side.shards),
                offsets,
                np.dtype(metadata.dtype),
                metadata.record_tokens,
                metadata.shard_records,
            )
        )
    return sides[0], sides[1]


def check_empty(folder: Path) -> None:
    """Raises InputError for a folder in which something is, or that cannot be made."""
    if (folder / UNFINISHED).is_file():
        raise InputError(
            f"{folder}: holds a preparation that was interrupted or is still running; "
            "delete the folder, or give another one"
        )
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise InputError(f"{folder}: is not empty; give a new folder")
    paths.check_folder(folder)


def _check_share(held_out: float) -> None:
    if not 0 < held_out < 1:
        raise InputError(f"held_out={held_out}: expected a value between 0 and 1")


class _SideWriter:
    """Cuts the tokens of one side into records, and the records into shards."""

    def __init__(self, folder: Path, side: str, dtype: np.dtype, size: int, shard_records: int):
        self._folder, self._side = folder, side
        self._dtype, self._size, self._shard_records = dtype, size, shard_records
        self._pending = np.zeros(0, dtype)
        self._lengths = array.array("q")
        self._bytes = 0
        self._records = 0
        self._paths: list[Path] = []
        self._close: Callable[[], None] = lambda: None

    def __enter__(self) -> "_SideWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def append(self, ids: Int[np.ndarray, " n"], text_bytes: int) -> None:
        self._lengths.append(len(ids))
        self._bytes += text_bytes
        tokens = np.concatenate([self._pending, ids.astype(self._dtype)])
        whole = len(tokens) - len(tokens) % self._size
        for start in range(0, whole, self._size):
            self._write(tokens[start : start + self._size])
        self._pending = tokens[whole:]

    def finish(self) -> Side:
        if len(self._pending):
            self._write(self._pending)
        self._close()
        lengths = np.frombuffer(self._lengths, np.int64)
        offsets = packing.offsets_of(lengths)
        np.save(self._folder / f"{self._side}_offsets.npy", offsets)
        return Side(
            documents=len(lengths),
            tokens=int(offsets[-1]),
            bytes=self._bytes,
            shards={path.name: path.stat().st_size for path in self._paths},
        )

    def _write(self, tokens: np.ndarray) -> None:
        if self._records % self._shard_records == 0:
            self._close()
            path = self._folder / f"{self._side}-{len(self._paths):05d}.array_record"
            self._paths.append(path)
            self._writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
            self._close = self._writer.close
        self._writer.write(tokens.tobytes())
        self._records += 1
        if self._records % self._shard_records == 0:
            self._close()
            self._close = lambda: None
