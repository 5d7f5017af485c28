"""Where a program may write, asked before it works for what it would write there."""

import os
import re
from pathlib import Path

from sharding.settings import InputError


def check_folder(folder: str | Path) -> None:
    """Raises InputError for a folder that is not there and cannot be made, or not be written."""
    if re.match(r"\w{2,}:/", str(folder)):
        raise InputError(
            f"{folder}: an address, not a folder; mount the bucket and give the folder it is "
            "mounted at"
        )
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir():
        raise InputError(f"{folder}: {there} is a file; expected a folder, or a new name")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"{folder}: {there} may not be written; expected a folder of yours")


def check_file(flag: str, path: str | Path) -> None:
    """Raises InputError unless the file that a flag names can be written; it is made if missing."""
    try:
        open(path, "a", encoding="utf-8").close()
    except OSError as error:
        raise InputError(f"--{flag}={path}: {error.strerror}") from None
