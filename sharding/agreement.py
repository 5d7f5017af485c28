"""What the processes of a run settle among themselves: that they are alike, when to stop, whose
rows of a batch are whose, and who keeps the others waiting.

All of it is free on one process. What is decided is decided once, by process 0 or by all, so that
no process can be in a collective that another does not enter.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Int64

from sharding import hosts, rules
from sharding.settings import InputError
from sharding.watch import FOREVER, ROOT

_FOREVER = int(FOREVER * 1e3)


def check_same(what: str, fields: Mapping[str, Any]) -> None:
    """Refuses, on every process, to go on with values that differ between processes.

    Args:
      what: they are of, for the message.
      fields: JSON values by name, the same names everywhere.

    Raises:
      InputError: some differ; names the first few, with both values.
    """
    if not hosts.several():
        return
    client, key, count = hosts.client(), hosts.unique("same"), jax.process_count()
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(dict(fields)))
    if jax.process_index() == 0:
        every = [
            json.loads(client.blocking_key_value_get(f"{key}/{process}", _FOREVER))
            for process in range(count)
        ]
        client.key_value_set(f"{key}/verdict", _difference(what, every))
    verdict = client.blocking_key_value_get(f"{key}/verdict", _FOREVER)
    if verdict:
        raise InputError(verdict)


def _difference(what: str, every: list[dict[str, Any]]) -> str:
    """In what the processes differ from process 0, in words; "" if in nothing."""
    ours, found = every[0], []
    for name in sorted(set().union(*every)):
        for process, theirs in enumerate(every):
            if theirs.get(name) != ours.get(name):
                found.append(
                    f"{name} is {ours.get(name)!r} on process 0, but {theirs.get(name)!r} on "
                    f"{hosts.name_of(process)}"
                )
                break
    if not found:
        return ""
    more = f" and {len(found) - 4} more" if len(found) > 4 else ""
    return (
        f"the hosts disagree about {what}: {'; '.join(found[:4])}{more}. "
        "Start the same command, on the same data and versions, on every host"
    )


def check_shared(folder: Path) -> None:
    """Raises InputError, on every process, unless all of them see the same `folder`."""
    if not hosts.several():
        return
    client, key = hosts.client(), hosts.unique("shared")
    mark = folder / f".shared-{key.rpartition('/')[2]}-{time.time_ns()}"
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
        client.key_value_set(key, mark.name)
    name = client.blocking_key_value_get(key, _FOREVER)
    seen = (folder / name).exists()
    try:
        check_same("the workdir", {f"whether {folder} is on storage that all share": seen})
    finally:
        if jax.process_index() == 0:
            mark.unlink(missing_ok=True)


def from_process_0(value: Callable[[], Any]) -> Any:
    """What `value()` gives on process 0 (a JSON value), on every process; asked there alone."""
    if not hosts.several():
        return value()
    client, key = hosts.client(), hosts.unique("value")
    if jax.process_index() == 0:
        client.key_value_set(key, json.dumps(value()))
    return json.loads(client.blocking_key_value_get(key, _FOREVER))


def gather(array: jax.Array) -> np.ndarray:
    """The whole of an array on every process, wherever its parts lie. All of them must call it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def host_rows(mesh: Mesh, batch: int) -> Int64[np.ndarray, "rows"]:
    """Which rows of a batch the devices of this process hold, in order.

    Where other axes than those of the batch cross hosts, several hosts hold the same rows.

    Args:
      mesh: of the run.
      batch: rows, which divide over it.

    Raises:
      InputError: the mesh gives two hosts rows of which some are the same and some are not.
    """
    parts = rules.named_sharding(mesh, "batch").devices_indices_map((batch,))
    held: dict[int, set[int]] = {}
    for device, (part,) in parts.items():
        held.setdefault(device.process_index, set()).update(range(*part.indices(batch)))
    ours = held[jax.process_index()]
    for process, theirs in held.items():
        if ours & theirs and ours != theirs:
            raise InputError(
                f"mesh {dict(mesh.shape)}: processes {jax.process_index()} and {process} share "
                "some rows of a batch but not all; choose data x fsdp so that it is a multiple of "
                "the hosts, or divides them"
            )
    return np.array(sorted(ours), np.int64)


def stop_at(step: int, should_stop: Callable[[], bool]) -> bool:
    """Whether all processes stop after this step; to be asked at every step, by all of them.

    One process that is told to stop stops all, a step or two later, at the same step.

    Args:
      step: that was dispatched last.
      should_stop: what this process alone was told.
    """
    told = should_stop()
    if not hosts.several():
        return told
    if told:
        hosts.request_stop()
    return multihost_utils.reached_preemption_sync_point(step)


@dataclasses.dataclass(frozen=True)
class Slow:
    """A process that comes later than the others: which, and by how many seconds a step."""

    process: int
    seconds: float

    def describe(self) -> str:
        """A line for the log."""
        return f"{hosts.name_of(self.process)} is slow: the others wait {self.seconds:.3g} s for it"


class Meetings:
    """Regular meetings of all processes at a barrier of hosts, while the devices work on.

    All hosts take the same time for a step, because its collectives make them; only the waits show
    which of them the others wait for.
    """

    CLEARLY = 0.1
    """Share of a step that the others wait from which on a process is called slow."""
    LEAST_SECONDS = 0.02
    """Less than this is noise."""

    def __init__(self):
        self._last: tuple[int, float] | None = None
        self._step_seconds = 0.0
        self._suspect: int | None = None

    def meet(self, step: int, due: Callable[[], bool]) -> tuple[bool, Slow | None]:
        """Waits for the others.

        Args:
          step: that was dispatched last.
          due: a question that process 0 answers for all.

        Returns:
          the answer, and on process 0 who was clearly slow at the last two meetings.
        """
        if not hosts.several():
            return due(), None
        client, key = hosts.client(), hosts.unique("meeting")
        slow = self._slowest(client) if jax.process_index() == 0 and self._last else None
        if jax.process_index() == 0:
            client.key_value_set(key, str(int(due())))
        before = time.monotonic()
        client.wait_at_barrier(key, _FOREVER)
        now = time.monotonic()
        client.key_value_set(f"{ROOT}/wait/{jax.process_index()}", str(now - before), True)
        if self._last and step > self._last[0]:
            self._step_seconds = (now - self._last[1]) / (step - self._last[0])
        self._last = step, now
        return client.key_value_try_get(key) == "1", slow

    def _slowest(self, client: Any) -> Slow | None:
        found = client.key_value_dir_get(f"{ROOT}/wait")
        waits = {int(key.rpartition("/")[2]): float(wait) for key, wait in found}
        slow = slowest(waits, max(self.CLEARLY * self._step_seconds, self.LEAST_SECONDS))
        before, self._suspect = self._suspect, slow and slow.process
        return slow if slow and slow.process == before else None


def slowest(waits: Mapping[int, float], least: float) -> Slow | None:
    """The process that the others waited for, if by more than `least` seconds.

    Args:
      waits: of each process at one barrier, seconds: who comes last waits least.
    """
    if len(waits) < 2:
        return None
    last = min(waits, key=waits.get)
    others = [wait for process, wait in waits.items() if process != last]
    late = statistics.median(others) - waits[last]
    return Slow(last, late) if late > least else None
