"""Tokenizers: bytes by default, byte-pair encoding through the `tokenizers` library."""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from jaxtyping import Int, Int32

from sharding.settings import InputError, nearest

_GROUP_CHARACTERS = 4 << 20
_REPLACEMENT = "\ufffd"
_WINDOW = 8

Item = TypeVar("Item")


class Tokenizer(Protocol):
    """Text to token ids and back."""

    @property
    def vocab_size(self) -> int:
        """One more than the greatest id."""

    @property
    def fingerprint(self) -> str:
        """Short text that is equal for tokenizers which give equal ids."""

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        """Ids of the text, no special tokens added."""

    def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "T"]]:
        """`encode` of each text."""

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        """Text of the ids; what is not valid UTF-8 becomes U+FFFD."""


@dataclasses.dataclass(frozen=True)
class ByteTokenizer:
    """A token is a byte of UTF-8."""

    vocab_size: int = 256
    fingerprint: str = "bytes"

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "T"]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        # A model's vocabulary may be padded beyond 256; such an id has no byte.
        return b"".join(
            bytes((i,)) if 0 <= i < 256 else _REPLACEMENT.encode() for i in np.asarray(ids).tolist()
        ).decode(errors="replace")


@dataclasses.dataclass(frozen=True)
class BPETokenizer:
    """A tokenizer of the `tokenizers` library.

    Raises:
      InputError: the library is missing, or `json` is not a tokenizer.
    """

    json: str = dataclasses.field(repr=False)  # contents of a tokenizer.json

    def __post_init__(self):
        _ = self._tokenizer  # bad contents are refused now, not at the first use

    @functools.cached_property
    def _tokenizer(self) -> Any:
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises nothing narrower
            raise InputError(f"not a tokenizer.json that can be read: {error}") from None
        # Settings of a file made for fixed-size inputs; they would cut documents in silence.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    @functools.cached_property
    def vocab_size(self) -> int:
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

    @functools.cached_property
    def fingerprint(self) -> str:
        return "bpe-" + hashlib.sha256(self.json.encode()).hexdigest()[:16]

    def encode(self, text: str) -> Int32[np.ndarray, "T"]:
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[Int32[np.ndarray, "T"]]:
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.int32) for encoding in found]

    def decode(self, ids: Int[np.ndarray, "T"] | Sequence[int]) -> str:
        return self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)

    def save(self, path: str | Path) -> None:
        """Writes the tokenizer.json."""
        Path(path).write_text(self.json, encoding="utf-8")


class StreamDecoder:
    """Decodes ids one by one, for printing text as it is generated.

    What `push` and at last `flush` return is together `tokenizer.decode` of all ids. A character
    is returned when it is whole.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._returned = 0  # characters of the text of _ids

    def push(self, token: int) -> str:
        """The text that is certain after one more id; may be empty."""
        self._ids.append(int(token))
        text = self._tokenizer.decode(self._ids)
        # Only a last U+FFFD can stand for a character that is still to be completed.
        new = text.removesuffix(_REPLACEMENT)[self._returned :]
        self._returned += len(new)
        if len(self._ids) > 2 * _WINDOW:
            # A few ids of context are enough: a character is at most four bytes long, and
            # tokenizers that treat the first word differently need one word before.
            self._ids = self._ids[-_WINDOW:]
            text = self._tokenizer.decode(self._ids)
            self._returned = len(text.removesuffix(_REPLACEMENT))
        return new

    def flush(self) -> str:
        """What was held back, U+FFFD for half a character; the decoder is then as new."""
        rest = self._tokenizer.decode(self._ids)[self._returned :]
        self._ids, self._returned = [], 0
        return rest


def load(spec: str) -> Tokenizer:
    """The tokenizer that `spec` stands for.

    Args:
      spec: `bytes`, the path of a tokenizer.json, or a folder with one.

    Raises:
      InputError: no such tokenizer, or the `tokenizers` library is missing.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise InputError(
            f"tokenizer {spec}: no such file; expected bytes or the path of a tokenizer.json"
            + nearest(spec, ("bytes",))
        )
    try:
        return BPETokenizer(path.read_text(encoding="utf-8"))
    except (InputError, UnicodeDecodeError) as error:
        raise InputError(f"tokenizer {path}: {error}") from None


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Learns a byte-level BPE tokenizer, which can hold any text.

    Args:
      texts: what the merges are counted on.
      vocab_size: tokens wanted, the 256 bytes included; a small text gives fewer.

    Raises:
      InputError: fewer than 256 tokens, or the `tokenizers` library is missing.
    """
    if vocab_size < 256:
        raise InputError(f"vocab_size={vocab_size}: expected at least 256, one for each byte")
    library = _library()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(tokenizer.to_str(pretty=True))


def encode_stream(
    tokenizer: Tokenizer, items: Iterable[tuple[Item, str]]
) -> Iterator[tuple[Item, Int32[np.ndarray, "T"]]]:
    """Ids of each item's text, in order, encoded in groups of a few megabytes."""
    group: list[tuple[Item, str]] = []
    size = 0
    for item, text in items:
        group.append((item, text))
        size += len(text)
        if size >= _GROUP_CHARACTERS:
            yield from _encode_group(tokenizer, group)
            group, size = [], 0
    yield from _encode_group(tokenizer, group)


def _encode_group(tokenizer, group):
    if group:
        items, texts = zip(*group, strict=True)
        yield from zip(items, tokenizer.encode_all(texts), strict=True)


def _library() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise InputError(
            "byte-pair encoding needs the tokenizers library: pip install 'parscale[bpe]'"
        ) from None
    return tokenizers
