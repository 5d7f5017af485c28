"""Corpora: UTF-8 documents in a fixed order, each on one side of the held-out split."""

import dataclasses
import functools
import glob
import hashlib
import importlib.util
import json
import math
import os
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import zstandard

from sharding.settings import InputError, nearest

BUILT_IN = ("pystdlib", "pypackages")
PACKAGES = (
    "absl", "array_record", "etils", "flax", "grain", "jax", "jaxlib", "jaxtyping", "ml_dtypes",
    "numpy", "opt_einsum", "optax", "orbax", "safetensors", "scipy", "tensorboardX", "tensorstore",
    "tqdm", "zstandard",
)  # fmt: skip
TEXT_FIELD = "text"

_READ_BYTES = 1 << 20
_SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload")
)
_DECOMPRESSORS = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Document:
    """A piece of text that stands for itself: a file, or a line of a jsonl file."""

    name: str
    data: bytes  # valid UTF-8, not empty

    @property
    def text(self) -> str:
        return self.data.decode()

    @functools.cached_property
    def digest(self) -> bytes:
        """SHA-256 of the contents."""
        return hashlib.sha256(self.data).digest()

    @property
    def place(self) -> float:
        """Where the contents fall in [0, 1), uniformly; the split cuts here."""
        return int.from_bytes(self.digest[:8], "big") / 2.0**64


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The files of a corpus, sorted by name."""

    spec: str
    files: tuple[tuple[str, Path], ...]  # name (relative, with slashes) and place of each

    @property
    def disk_bytes(self) -> int:
        """Bytes of the files as they lie on disk, compressed or not."""
        return sum(path.stat().st_size for _, path in self.files)


class Split:
    """Goes once over the documents of a corpus: the side of each, and the hash of all.

    The side depends on a document's contents alone, so that it stays when other files come and go,
    and copies of one file cannot lie on both sides.
    """

    def __init__(self, spec: str, held_out: float | None):
        """`held_out` is the share that training never sees; None holds every document out."""
        self._spec = spec
        self._held_out = held_out
        self._hash = hashlib.sha256()
        self._documents = 0
        self._first, self._last = math.inf, -math.inf

    def is_held_out(self, document: Document) -> bool:
        """Takes the next document into the hash; True where training must not see it."""
        name = document.name.encode()
        self._hash.update(len(name).to_bytes(8, "big") + name + document.digest)
        self._documents += 1
        self._first = min(self._first, document.place)
        self._last = max(self._last, document.place)
        return self._held_out is None or document.place < self._held_out

    def finish(self) -> str:
        """SHA-256 (hex) over the names and contents of all documents.

        Raises:
          InputError: a side of the split has no document.
        """
        if self._held_out is None or self._first < self._held_out <= self._last:
            return self._hash.hexdigest()
        side = "train on" if self._last < self._held_out else "hold out"
        message = (
            f"corpus {self._spec}: of its {self._documents} documents held_out={self._held_out} "
            f"leaves none to {side}"
        )
        share = self._share_that_splits()
        mend = f"--config.data.held_out={share} would do, or " if share else ""
        raise InputError(f"{message}; {mend}give more files, or a .jsonl with many documents")

    def _share_that_splits(self) -> float | None:
        for digits in range(2, 7):
            share = (math.floor(self._first * 10**digits) + 1) / 10**digits
            if self._first < share <= self._last and share < 1:
                return share
        return None


def find(spec: str) -> Corpus:
    """The files that `spec` stands for.

    Args:
      spec: `pystdlib` (the running Python's standard library, without its tests), `pypackages`
        (the sources of PACKAGES as installed, without their tests), a file, a folder (all files
        below it but hidden ones), or a glob, in which `**` stands for any depth.

    Raises:
      InputError: nothing is found.
    """
    if spec == "pystdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        files = [("", root)]
    elif spec == "pypackages":
        files = [(f"{name}/", root) for name in PACKAGES for root in _package_roots(name)]
    else:
        return _find_text(spec)
    found = sorted((prefix + name, path) for prefix, root in files for name, path in _sources(root))
    if not found:
        raise InputError(
            f"corpus {spec}: no source files are installed with this Python; "
            "give a folder or a glob of text files"
        )
    return Corpus(spec, tuple(found))


def documents(corpus: Corpus, progress: Progress | None = None) -> Iterator[Document]:
    """The documents of a corpus, in order, read one file at a time.

    A file is a document; in a `.jsonl` file each line is one, an object whose "text" counts (lines
    without any text are left out). `.gz` and `.zst` files are decompressed. Of pystdlib and
    pypackages, which nobody chose file by file, empty files and those in another encoding are left
    out.

    Args:
      corpus: as `find` returns it.
      progress: called with the number of bytes read from disk, again and again.

    Raises:
      InputError: a file is empty, unreadable, damaged, not UTF-8, or its jsonl has no text.
    """
    built_in = corpus.spec in BUILT_IN
    for name, path in corpus.files:
        chunks = _chunks(path, progress)
        if path.name.removesuffix(".gz").removesuffix(".zst").endswith(".jsonl"):
            yield from _jsonl_documents(name, path, chunks)
            continue
        data = b"".join(chunks)
        try:
            data.decode()
        except UnicodeDecodeError as error:
            if built_in:
                continue
            raise _not_utf8(path, error.start) from None
        if data:
            yield Document(name, data)
        elif not built_in:
            raise InputError(f"{path}: the file is empty; delete it or leave it out of the corpus")


def _package_roots(name: str) -> list[Path]:
    found = importlib.util.find_spec(name)
    return [Path(root) for root in found.submodule_search_locations or ()] if found else []


def _sources(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, folders, names in os.walk(root):
        # Folders and modules that the build of this one machine has written would make the hash
        # differ between machines with the same Python.
        folders[:] = [
            f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("config-")
        ]
        for name in names:
            if name.endswith(".py") and not name.startswith(("_sysconfigdata", "sitecustomize")):
                path = Path(folder, name)
                yield path.relative_to(root).as_posix(), path


def _find_text(spec: str) -> Corpus:
    root = Path(spec).expanduser()
    if root.is_dir():
        paths = [
            path
            for path in root.rglob("*")
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
        ]
    elif root.is_file():
        root, paths = root.parent, [root]
    else:
        matches = glob.glob(str(root), recursive=True)
        paths = [Path(match) for match in matches if os.path.isfile(match)]
        if paths:
            root = Path(os.path.commonpath([path.parent for path in paths]))
    if not paths:
        raise InputError(
            f"corpus {spec}: no file is there; expected {', '.join(BUILT_IN)}, a folder, a file "
            f"or a glob such as 'texts/**/*.txt'{nearest(spec, BUILT_IN)}"
        )
    return Corpus(spec, tuple(sorted((path.relative_to(root).as_posix(), path) for path in paths)))


def _chunks(path: Path, progress: Progress | None) -> Iterator[bytes]:
    """The decompressed contents of a file, piece by piece."""
    fresh = _DECOMPRESSORS.get(path.suffix)
    unpack = None
    try:
        with path.open("rb") as raw:
            while chunk := raw.read(_READ_BYTES):
                if progress:
                    progress(len(chunk))
                if not fresh:
                    yield chunk
                    continue
                while chunk:
                    # Both formats allow several compressed members one after the other.
                    unpack = fresh() if unpack is None or unpack.eof else unpack
                    yield unpack.decompress(chunk)
                    chunk = unpack.unused_data
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (zlib.error, zstandard.ZstdError) as error:
        raise InputError(f"{path}: damaged, or not a {path.suffix} file: {error}") from None
    if unpack and not unpack.eof:
        raise InputError(f"{path}: the {path.suffix} file ends too early; copy it again")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    pending: list[bytes] = []
    for chunk in chunks:
        head, newline, tail = chunk.partition(b"\n")
        pending.append(head)
        if newline:
            yield b"".join(pending)
            *whole, last = tail.split(b"\n")
            yield from whole
            pending = [last]
    if any(pending):
        yield b"".join(pending)


def _jsonl_documents(name: str, path: Path, chunks: Iterable[bytes]) -> Iterator[Document]:
    offset, found = 0, False
    for number, line in enumerate(_lines(chunks), start=1):
        data = _jsonl_text(path, number, offset, line) if line.strip() else b""
        offset += len(line) + 1
        if data:
            found = True
            yield Document(f"{name}#{number}", data)
    if not found:
        raise InputError(f"{path}: no line has any text; delete it or leave it out of the corpus")


def _jsonl_text(path: Path, number: int, offset: int, line: bytes) -> bytes:
    where = f"{path}, line {number}"
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(path, offset + error.start) from None
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}); a .jsonl has one object a line") from None
    text = record.get(TEXT_FIELD) if isinstance(record, dict) else None
    if not isinstance(text, str):
        keys = (
            f"with the fields {sorted(record)}" if isinstance(record, dict) else repr(record)[:60]
        )
        raise InputError(f'{where}: expected an object with a string "{TEXT_FIELD}", found {keys}')
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: character {error.start} of the text is half of a surrogate pair; "
            "write the text again as valid Unicode"
        ) from None


def _not_utf8(path: Path, offset: int) -> InputError:
    return InputError(
        f"{path}: not UTF-8 at byte {offset}; convert it (iconv -t UTF-8) or leave it out"
    )
