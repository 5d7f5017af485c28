"""A list of a folder's files with their sizes and checksums, so that damage to any of them is seen.

The manifest is written last, in one atomic rename: a folder that has one was written to its end.
"""

import json
import os
import zlib
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

NAME = "manifest.json"
_CHUNK = 1 << 20


def write_manifest(folder: Path) -> None:
    """Lists every file under `folder` in `folder/manifest.json`: relative path, bytes, CRC-32.

    Raises:
      OSError: a file cannot be read or the manifest cannot be written; then there is no manifest.
    """
    paths = sorted(path for path in _files(folder) if path.name != NAME)
    with ThreadPoolExecutor(_threads()) as pool:
        sums = list(pool.map(_checksum, paths))
    files = {
        path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, sums, strict=True)
    }
    partial = folder / (NAME + ".partial")
    partial.write_text(json.dumps({"files": files}, indent=1))
    os.replace(partial, folder / NAME)


def has_manifest(folder: Path) -> bool:
    """Whether `folder` was written to its end."""
    return (folder / NAME).is_file()


def find_damage(folder: Path, items: Collection[str] | None = None) -> str:
    """What is wrong with the files of a folder that has a manifest; empty if nothing is.

    Args:
      folder: where `write_manifest` was called.
      items: the sub-folders to look at (files beside them always are); all of them by default.

    Returns:
      the first damaged file and how it differs, as one line without a full stop.
    """
    try:
        files = json.loads((folder / NAME).read_text())["files"]
        listed = [(folder / name, tuple(entry)) for name, entry in files.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} cannot be read ({error})"
    if items is not None:
        listed = [
            (path, entry)
            for path, entry in listed
            if path.parent == folder or path.relative_to(folder).parts[0] in items
        ]
    with ThreadPoolExecutor(_threads()) as pool:
        return next(filter(None, pool.map(lambda pair: _compare(folder, *pair), listed)), "")


def _compare(folder: Path, path: Path, expected: tuple[int, int]) -> str:
    name = path.relative_to(folder).as_posix()
    try:
        size = path.stat().st_size
        if size != expected[0]:
            return f"{name} has {size} bytes instead of {expected[0]}"
        if _checksum(path) != expected:
            return f"{name} has other contents than were written (its checksum differs)"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror})"
    return ""


def _checksum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def _threads() -> int:
    # zlib and read() let other threads run; more than a few only contend for the disk.
    return min(8, os.cpu_count() or 1)
