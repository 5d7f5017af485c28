"""Checkpoints of a run: written in the background, checked for damage when read.

A checkpoint directory holds one folder per saved step, `checkpoints/1200/`, and in it one folder
per item: each tree of the state that is saved ("trainable", "frozen", "optimizer"), "scalars" for
its lone arrays, and "record", a small JSON dictionary. Items are read separately, so a program
that needs only the parameters reads only those.

A step is *complete* when it has a manifest (`parscale.manifest`), which is written last. What is
not complete, or does not match its manifest, is passed over in favour of an older step:

- `restore` goes back to the newest sound step. Newer damaged ones are then renamed `N.damaged`,
  so that they neither count as checkpoints nor stand in the way of step N when it comes again;
- leftovers (`N.damaged`, folders without a manifest) are removed once a checkpoint of the same or
  a later step is complete, and never before;
- of the complete steps up to the one just saved, the newest `keep` stay.

With several processes the directory is on storage that all of them see; process 0 chooses the
step to restore, and writes the manifests.
"""

import contextlib
import json
import logging
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from parscale.manifest import NAME as MANIFEST
from parscale.manifest import find_damage, has_manifest, write_manifest
from parscale.stored_arrays import (
    RECORD,
    check_same,
    flatten,
    from_items,
    listed,
    nest,
    read_arrays,
    read_record,
    save_args,
    stored_items,
    to_items,
    unflatten,
)
from sharding.settings import InputError

PARAMETERS = ("trainable", "frozen")
_DAMAGED = ".damaged"
_UNFINISHED = ".orbax-checkpoint-tmp"
_NONE, _ALL_DAMAGED = -1, -2


def _is_not_of_orbax(entry: logging.LogRecord) -> bool:
    return "orbax" not in entry.pathname and "orbax" not in entry.getMessage()


# Orbax logs a failure once for each of its threads, with tracebacks; here it is raised, once.
for _logger in ("absl", "asyncio"):
    logging.getLogger(_logger).addFilter(_is_not_of_orbax)


class SaveError(RuntimeError):
    """A checkpoint could not be written. Those that were complete before still are."""


class Checkpoints:
    """The checkpoints of one run, for the program that writes them.

    Use as a context manager, or call `close`: both wait for the save in progress.
    """

    def __init__(self, directory: str | Path, keep: int = 3):
        """Opens or creates a checkpoint directory and removes saves that a dead process began.

        Raises:
          InputError: `directory` is something else than a checkpoint directory, or keep < 1.
        """
        if keep < 1:
            raise InputError(f"keep={keep}: expected at least 1 checkpoint to keep")
        self.directory = Path(directory).absolute()
        self.keep = keep
        if self.directory.exists():
            _check_directory(self.directory)
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(self.directory)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        if error is None:
            self.close()
        else:  # a failed save must not hide the error that ended the run
            with contextlib.suppress(SaveError):
                self.close()

    def steps(self) -> list[int]:
        """The complete steps, oldest first. Their contents are not checked here."""
        return _complete_steps(self.directory)

    def latest_complete(self) -> int | None:
        """The newest complete step, or None."""
        return max(self.steps(), default=None)

    def save(
        self, step: int, arrays: Mapping[str, Any], record: Mapping[str, Any], wait: bool = False
    ) -> bool:
        """Begins to save a state; returns once the arrays may be changed or donated.

        Args:
          step: optimizer steps done.
          arrays: name -> pytree of arrays, or one array (`vars` of a dataclass will do).
          record: a JSON dictionary kept beside the arrays.
          wait: return only when the checkpoint is complete.

        Returns:
          False if this step already has a complete and undamaged checkpoint, which then stays.

        Raises:
          SaveError: the save before this one (or with `wait`, this one) failed. This one was then
            not begun; a later call may succeed.
          TypeError: `record` is not JSON.
        """
        self.wait()
        json.dumps(record)
        if self._from_process_0(lambda: int(self._has_sound(step))):
            return False
        if jax.process_index() == 0:
            _remove_unfinished(self.directory)  # threads of a failed save may write a little longer
        try:
            self._checkpointer.save(self._folder(step), args=save_args(arrays, record))
        except OSError as error:
            raise self._save_error(step, error) from error
        self._pending = step, self._thread.submit(self._finish, step)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Waits until the save in progress, if any, is complete.

        Raises:
          SaveError: it failed (for example: no space left on the device).
        """
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        try:
            future.result()
        except Exception as error:
            raise self._save_error(step, error) from error

    def close(self) -> None:
        """Waits for the save in progress and frees the threads.

        Raises:
          SaveError: the save failed.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()

    def restore(self, abstract: Mapping[str, Any]) -> tuple[int, dict[str, Any], dict] | None:
        """The newest undamaged checkpoint, laid out as `abstract` says.

        Args:
          abstract: like the `arrays` that were saved, with leaves `jax.ShapeDtypeStruct`. A leaf
            with a sharding becomes a `jax.Array` laid out so, on any mesh; one without becomes a
            NumPy array.

        Returns:
          step, arrays in the structure of `abstract`, record; None if nothing was saved yet.
          A line on stderr tells of each damaged step that was passed over.

        Raises:
          InputError: every checkpoint is damaged, or the stored arrays are not those of `abstract`.
        """
        self.wait()
        step = self._from_process_0(self._newest_sound)
        if step == _ALL_DAMAGED:
            raise InputError(_none_left(self.directory))
        if step == _NONE:
            return None
        folder = self._folder(step)
        stored = stored_items(folder)
        wanted = to_items(abstract)
        if wanted.keys() != stored.keys():
            raise InputError(
                f"checkpoint {folder} holds {listed(stored)}, but {listed(sorted(wanted))} are "
                "expected: it was written with another train.trainable or by another program"
            )
        items = {}
        for name, tree in wanted.items():
            check_same(folder, name, stored[name], flatten(tree))
            items[name] = unflatten(read_arrays(folder, name, flatten(tree)), like=tree)
        return step, from_items(items, abstract), read_record(folder)

    def _newest_sound(self) -> int:
        """The step to restore (process 0 only); sets newer damaged ones aside."""
        step, damaged = _find_sound(self.directory)
        if step is None:
            aside = self.directory.glob(f"*{_DAMAGED}")
            return _ALL_DAMAGED if damaged or any(map(has_manifest, aside)) else _NONE
        for newer in (number for number in _numbers(self.directory) if number > step):
            self._set_aside(newer)
        return step

    def _has_sound(self, step: int) -> bool:
        """Whether `step` need not be saved again; if it must be, its place is free afterwards."""
        folder = self._folder(step)
        if not folder.exists():
            return False
        if has_manifest(folder) and not find_damage(folder):
            return True
        self._set_aside(step)
        return False

    def _set_aside(self, step: int) -> None:
        aside = self.directory / f"{step}{_DAMAGED}"
        if aside.exists():
            shutil.rmtree(aside)
        self._folder(step).rename(aside)

    def _finish(self, step: int) -> None:
        """The background's last part: make the step complete, then remove what it replaces."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            write_manifest(self._folder(step))
            try:
                self._prune(step)
            except OSError as error:
                _warn(f"an old checkpoint could not be removed: {error}")

    def _prune(self, step: int) -> None:
        complete = [number for number in self.steps() if number <= step]
        kept = set(complete[-self.keep :])
        for path in list(self.directory.iterdir()):
            number = path.name.removesuffix(_DAMAGED)
            if number.isdecimal() and int(number) <= step and path.name not in map(str, kept):
                # Without its manifest a folder that is half removed is no checkpoint.
                (path / MANIFEST).unlink(missing_ok=True)
                shutil.rmtree(path)

    def _save_error(self, step: int, error: Exception) -> SaveError:
        """The one error of a failed save, after its remains are removed."""
        if jax.process_index() == 0:
            _remove_unfinished(self.directory)
            if not has_manifest(self._folder(step)):
                shutil.rmtree(self._folder(step), ignore_errors=True)
        latest = self.latest_complete()
        before = (
            "no earlier one exists" if latest is None else f"the one of step {latest} is intact"
        )
        reason = (str(error) or type(error).__name__).splitlines()[0]
        reason = reason if len(reason) < 200 else f"... {reason[-150:]}"
        return SaveError(
            f"the checkpoint of step {step} could not be written to {self.directory}; {before}. "
            f"Is there space left on the device? Cause: {reason}"
        )

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _from_process_0(self, value) -> int:
        """`value()` of process 0, on every process."""
        result = value() if jax.process_index() == 0 else 0
        if jax.process_count() > 1:
            result = int(multihost_utils.broadcast_one_to_all(np.int32(result)))
        return result


def restore_params(
    directory: str | Path,
    abstract: Any | None = None,
    *,
    step: int | None = None,
    partial: bool = False,
) -> tuple[int, dict, dict]:
    """The parameters alone, whichever part of them was being trained; changes nothing on disk.

    Args:
      directory: a run's checkpoint directory.
      abstract: nested dict of `jax.ShapeDtypeStruct`; leaves with a sharding become `jax.Array`,
        others NumPy arrays. None: all that is stored, as NumPy arrays.
      step: this step; None: the newest undamaged one.
      partial: `abstract` may leave arrays out, and those are not read.

    Returns:
      step, nested dict of parameters, record.

    Raises:
      InputError: no checkpoint directory, no such step, all damaged, or arrays that are missing,
        not expected, or of another shape or dtype (named).
    """
    folder = _choose_folder(Path(directory), step)
    stored = stored_items(folder, PARAMETERS)
    held = {path: leaf for paths in stored.values() for path, leaf in paths.items()}
    wanted = held if abstract is None else flatten(abstract)
    check_same(folder, "parameters", held, wanted, partial)
    read = {}
    for name, paths in stored.items():
        part = {path: leaf for path, leaf in wanted.items() if path in paths}
        read |= read_arrays(folder, name, part) if part else {}
    params = nest(read) if abstract is None else unflatten(read, like=abstract)
    return int(folder.name), params, read_record(folder)


def stored_shapes(directory: str | Path, *, step: int | None = None) -> dict[str, Any]:
    """Item name -> nested dict of `jax.ShapeDtypeStruct`, without reading the arrays.

    Raises:
      InputError: no checkpoint directory, no such step, or all damaged.
    """
    items = stored_items(_choose_folder(Path(directory), step))
    return {name: nest(paths) for name, paths in items.items()}


def _check_directory(directory: Path) -> None:
    """Raises InputError if something other than checkpoints is there."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else ["a file"]
    if names and not any(map(_is_ours, names)):
        raise InputError(
            f"{directory} is not a checkpoint directory (it has {listed(names)}): expected one "
            "with a numbered folder for each saved step, like the `checkpoints` of a run's workdir"
        )


def _is_ours(name: str) -> bool:
    return name.removesuffix(_DAMAGED).isdecimal() or _UNFINISHED in name


def _choose_folder(directory: Path, step: int | None) -> Path:
    """The folder of the step asked for, or of the newest whose parameters are undamaged."""
    directory = directory.absolute()
    if not directory.exists():
        raise InputError(
            f"{directory}: there is no such checkpoint directory; expected one with a numbered "
            "folder for each saved step, like the `checkpoints` of a run's workdir"
        )
    _check_directory(directory)
    items = (*PARAMETERS, RECORD)
    if step is None:
        step, _ = _find_sound(directory, items)
        if step is None:
            raise InputError(_none_left(directory, items))
    else:
        steps = _complete_steps(directory)
        if step not in steps:
            raise InputError(f"{directory} has no complete step {step}; it has {listed(steps)}")
        if damage := find_damage(directory / str(step), items):
            raise InputError(f"checkpoint {directory / str(step)} is damaged: {damage}")
    return directory / str(step)


def _find_sound(
    directory: Path, items: tuple[str, ...] | None = None
) -> tuple[int | None, list[int]]:
    """The newest undamaged step, and the damaged ones newer than it; warns of those."""
    damaged = []
    for step in reversed(_numbers(directory)):
        folder = directory / str(step)
        if not has_manifest(folder):
            _warn(f"checkpoint {folder} is passed over: it was not written to its end")
        elif damage := find_damage(folder, items):
            _warn(f"checkpoint {folder} is damaged and passed over: {damage}")
            damaged.append(step)
        else:
            return step, damaged
    return None, damaged


def _none_left(directory: Path, items: tuple[str, ...] | None = None) -> str:
    """The message for a directory without a sound checkpoint, naming what is wrong with each."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.name.removesuffix(_DAMAGED).isdecimal():
            complete = has_manifest(path)
            reason = find_damage(path, items) if complete else "not written to its end"
            found.append(f"{path.name}: {reason or 'set aside'}")
    return (
        f"{directory} has no checkpoint that can be read ({listed(found)}): restore it from a "
        "copy, or start again with an empty directory"
    )


def _numbers(directory: Path) -> list[int]:
    """The steps that have a folder, complete or not, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _complete_steps(directory: Path) -> list[int]:
    return [step for step in _numbers(directory) if has_manifest(directory / str(step))]


def _remove_unfinished(directory: Path) -> None:
    for path in directory.glob(f"*{_UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
