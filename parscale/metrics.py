"""The run's figures: a row per report in `metrics.csv`, and the same as TensorBoard events.

A row reaches the file whole and at once, so a kill costs at most the row being written. A resumed
run drops the rows beyond the step it goes on from: the file reads as if nothing had interrupted it.
"""

import contextlib
import csv
import io
import os
import time
from pathlib import Path
from typing import Any

from sharding.settings import InputError

NAME = "metrics.csv"
COLUMNS = (
    "step",
    "tokens",
    "loss",
    "learning_rate",
    "grad_norm",
    "skipped",
    "tokens_per_second",
    "tflops_per_second",
    "seconds",
    "held_out_loss",
    "bits_per_byte",
)
_COUNTS = frozenset({"step", "tokens", "skipped"})


class NoMetrics(contextlib.AbstractContextManager):
    """What the other processes of a run have in the place of process 0's `MetricsWriter`."""

    def __exit__(self, kind, error, trace) -> None:
        pass

    def write(self, step: int, **values: float | int | None) -> None:
        """Writes nothing."""


class MetricsWriter:
    """Appends rows to a workdir's `metrics.csv` and TensorBoard events. A context manager."""

    def __init__(self, workdir: str | Path, resume_step: int = 0):
        """Opens the records of a run that has done `resume_step` steps; later rows are dropped.

        Raises:
          InputError: `metrics.csv` is there, but is not a file of this kind.
        """
        workdir = Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / NAME
        kept = [row for row in _read_whole_rows(self._path) if int(row["step"]) <= resume_step]
        partial = self._path.with_suffix(".partial")
        partial.write_text(_line(COLUMNS) + "".join(_line(row.values()) for row in kept))
        os.replace(partial, self._path)
        # Unbuffered: every row is one write to the end of the file.
        self._file = self._path.open("ab", buffering=0)
        self._events = _Events(workdir, resume_step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def write(self, step: int, **values: float | int | None) -> None:
        """Adds a row. Columns that are not given, or None, stay blank.

        Args:
          step: optimizer steps done.
          values: any of `COLUMNS`, as Python or NumPy scalars. Units: seconds of training since
            the very beginning, losses in nats per token.

        Raises:
          KeyError: a name that is not a column.
          OSError: it cannot be written, as on a full disk.
        """
        if unknown := values.keys() - set(COLUMNS):
            raise KeyError(f"no such columns: {', '.join(sorted(unknown))}")
        row = {"step": step, **{name: value for name, value in values.items() if value is not None}}
        self._file.write(_line(_text(name, row.get(name)) for name in COLUMNS).encode())
        self._events.write(int(row.pop("step")), row)

    def close(self) -> None:
        """Closes both files."""
        self._file.close()
        self._events.close()


class _Events:
    """A file of TensorBoard events, written by the caller.

    tensorboardX's SummaryWriter leaves that to a thread, which ends if it cannot write, on a full
    disk say; whoever hands it events then waits for ever.
    """

    def __init__(self, workdir: Path, resume_step: int):
        # Only the process that writes records needs it, and it takes a while to import.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        self._Event = event_pb2.Event
        # Files are named by the second: a quick restart must not overwrite the one before.
        self._writer = EventsWriter(str(workdir / "events"), f".{resume_step}.{os.getpid()}")
        # TensorBoard is to forget what it has seen from this step on.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(step=resume_step + 1, session_log=start)

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Adds the values of a step."""
        figures = [{"tag": name, "simple_value": float(value)} for name, value in values.items()]
        self._add(step=step, summary={"value": figures})

    def _add(self, **fields) -> None:
        self._writer.write_event(self._Event(wall_time=time.time(), **fields))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_csv(path: str | Path) -> dict[str, list[float | None]]:
    """The columns of a `metrics.csv` (or of the one in a workdir).

    Returns:
      column name -> a value per row; None where the row is blank. `step`, `tokens` and `skipped`
      are integers. A last row that was cut off by a kill is left out.

    Raises:
      InputError: the file is missing or of another kind.
    """
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: there is no such file; expected the {NAME} of a run's workdir")
    rows = _read_whole_rows(path)
    return {name: [_value(name, row[name]) for row in rows] for name in COLUMNS}


def _read_whole_rows(path: Path) -> list[dict[str, str]]:
    """Rows as text; a last one without its line end is left out, and so is a torn header."""
    if not path.is_file():
        return []
    content = path.read_bytes().decode(errors="replace")
    whole = content[: content.rfind("\n") + 1]
    if not whole and _line(COLUMNS).startswith(content):
        return []
    header, *rows = csv.reader(io.StringIO(whole)) if whole else [[content]]
    if tuple(header) != COLUMNS:
        raise InputError(
            f"{path} is not the record of a run: its first line is {','.join(header)[:80]!r}, "
            f"expected {','.join(COLUMNS)!r}; move it away"
        )
    for number, row in enumerate(rows, start=2):
        if len(row) != len(COLUMNS) or not row[0].isdecimal():
            raise InputError(
                f"{path}, line {number}: expected {len(COLUMNS)} values, a step first; "
                "mend or remove the line"
            )
    return [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def _line(values: Any) -> str:
    return ",".join(values) + "\n"


def _text(name: str, value: float | int | None) -> str:
    if value is None:
        return ""
    # Nine digits distinguish any two float32 values.
    return str(int(value)) if name in _COUNTS else f"{float(value):.9g}"


def _value(name: str, text: str) -> float | int | None:
    if not text:
        return None
    return int(text) if name in _COUNTS else float(text)
