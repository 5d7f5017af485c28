"""Several processes as one run: they start together, watch over each other, and end together.

Each host runs the same command. The processes find each other through JAX's coordination service,
which process 0 serves. Its key-value store is all that is used here: no device, no collective, so
that what is said here is said when collectives hang.

How they watch over each other is in `sharding.watch`.

Nothing here imports jax before a run of several processes is known to begin.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from sharding.settings import InputError, check_at_least, option
from sharding.watch import ROOT, Watch, say

TPU_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*")
_watch: Watch | None = None
_numbers = itertools.count()
_stop_requested = threading.Event()


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """How the processes of a run find each other. By hand it takes the first three fields."""

    coordinator: str = option("", "host:port of process 0; found in a cluster that JAX knows")
    num_processes: int = option(
        0, "processes of the run; 0: found in a cluster that JAX knows; 1: this one alone"
    )
    process_id: int = option(-1, "which of them this is, from 0; -1: found in a cluster")
    heartbeat_seconds: int = option(30, "a process that is silent for so long is lost")
    initialization_seconds: int = option(300, "how long processes wait for each other at the start")

    def __post_init__(self):
        check_at_least(self, 2, "heartbeat_seconds")
        check_at_least(self, 1, "initialization_seconds")
        check_at_least(self, 0, "num_processes")
        check_at_least(self, -1, "process_id")
        by_hand = {
            "--coordinator": bool(self.coordinator),
            "--num_processes": self.num_processes > 0,
            "--process_id": self.process_id >= 0,
        }
        if self.num_processes != 1 and any(by_hand.values()) and not all(by_hand.values()):
            missing = ", ".join(name for name, given in by_hand.items() if not given)
            raise InputError(
                f"{missing} missing: give --coordinator, --num_processes and --process_id "
                "together, or none of them in a cluster that is detected"
            )
        if self.num_processes and self.process_id >= self.num_processes:
            raise InputError(
                f"--process_id={self.process_id}: expected 0 to {self.num_processes - 1}, "
                f"as --num_processes={self.num_processes}"
            )
        host, _, port = self.coordinator.rpartition(":")
        if self.coordinator and not (host and port.isdecimal() and 0 < int(port) < 2**16):
            raise InputError(
                f"--coordinator={self.coordinator}: expected host:port of process 0, "
                "as 10.0.0.1:8476"
            )


def start(config: HostsConfig) -> bool:
    """Joins the other processes of the run; before anything touches a device.

    Without the flags that say so by hand, a cluster is looked for: Cloud TPU, SLURM, Open MPI,
    and Kubernetes jobs. One process alone starts nothing and imports nothing.

    Returns:
      whether there are several processes.

    Raises:
      InputError: the coordinator cannot be reached, or what is found of a cluster is not enough.
    """
    global _watch
    by_hand = bool(config.coordinator)
    found = "" if config.num_processes == 1 or by_hand else find_cluster()
    if config.num_processes == 1 or not (by_hand or found):
        return False
    import jax

    given: dict[str, Any] = {}
    if by_hand:
        if config.process_id:
            _reach(config.coordinator, config.initialization_seconds)
        given = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",
        }
    with _time_limit(config.initialization_seconds):
        try:
            jax.distributed.initialize(
                **given,
                # Ours end the process earlier and in one line.
                initialization_timeout=2 * config.initialization_seconds + 60,
                heartbeat_timeout_seconds=2 * config.heartbeat_seconds,
            )
        except (ValueError, RuntimeError) as error:
            if found == "Cloud TPU" and "coordinator_address" in str(error):
                return False  # chips of a machine that is alone
            raise InputError(
                f"the processes could not meet ({found or 'by hand'}): {error}"
            ) from None
    _watch = Watch(config.heartbeat_seconds)
    return several()


def find_cluster() -> str:
    """Which kind of cluster this process was started in; "" if none. Asks the environment alone.

    Raises:
      InputError: a Kubernetes job whose index is there, but not the package to ask it with.
    """
    environment = os.environ
    if _several(environment.get("SLURM_NTASKS")) and "SLURM_PROCID" in environment:
        return "SLURM" if "SLURM_STEP_NODELIST" in environment else ""
    if _several(environment.get("OMPI_COMM_WORLD_SIZE")):
        return "Open MPI"
    workers = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
    on_tpu = environment.get("JAX_PLATFORMS", "tpu").startswith("tpu") and any(
        map(glob.glob, TPU_DEVICES)
    )
    if on_tpu and (workers is None or "," in workers or _several_slices()):
        return "Cloud TPU"
    if not on_tpu and {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environment.keys():
        import importlib.util

        if importlib.util.find_spec("kubernetes") is None:
            raise InputError(
                "an indexed Kubernetes job was found, but not the Python package kubernetes that "
                "asks it for its hosts: install it, give --coordinator, --num_processes and "
                "--process_id, or --num_processes=1 for a process that is alone"
            )
        return "Kubernetes"
    return ""


def _several(count: str | None) -> bool:
    return bool(count) and count.isdecimal() and int(count) > 1


def _several_slices() -> bool:
    return _several(os.environ.get("MEGASCALE_NUM_SLICES"))


def _reach(coordinator: str, seconds: float) -> None:
    """Waits until the coordinator's port takes connections; JAX would abort without saying where.

    Raises:
      InputError: it does not in time.
    """
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            socket.create_connection((host.strip("[]"), int(port)), max(min(left, 10), 0.1)).close()
            return
        except OSError as error:
            reason = error
        if left < 0:
            raise InputError(
                f"--coordinator={coordinator} could not be reached within {seconds:g} s "
                f"({reason}): is process 0 running there, with this port open to the other hosts?"
            )
        time.sleep(min(0.5, max(left, 0.01)))


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Ends the process if what is inside takes longer: JAX aborts then, with a stack trace."""

    def end() -> None:
        from jax._src import distributed

        address = distributed.global_state.coordinator_address or "the cluster's service"
        say(
            f"error: not all processes of the run came together at {address} within {seconds:g} s: "
            "start the same command on every host, or look at those that failed"
        )
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def client() -> Any:
    """The client of the coordination service; None where one process is alone."""
    if _watch is None:
        return None
    # Its key-value store has no public name in JAX.
    from jax._src import distributed

    return distributed.global_state.client


def several() -> bool:
    """Whether this process is one of several that began with `start`."""
    return _watch is not None and _watch.count > 1


def name_of(process: int) -> str:
    """`process 3 on tpu-worker-3`."""
    return f"process {process} on {client().key_value_try_get(f'{ROOT}/host/{process}')}"


def unique(name: str) -> str:
    """A key that is not used again, the same on every process that asks in the same order."""
    return f"{ROOT}/{name}/{next(_numbers)}"


def request_stop() -> None:
    """Lets every process stop at one step, by the signal with which clusters announce an end.

    JAX's preemption service sees it and tells the others; see `sharding.agreement.stop_at`.
    """
    if not _stop_requested.is_set():
        _stop_requested.set()
        os.kill(os.getpid(), signal.SIGTERM)


def leave(code: int = 0, reason: str = "", orderly: bool = True) -> None:
    """Leaves the run, the last thing a program does. Nothing happens where it never joined.

    In order, the processes wait for each other; then this returns. A process that failed does not
    come back from here: it tells the others why, and ends with `code`. If another was lost, which
    is why collectives fail here, it waits until that is known, so that the right one is named.

    Args:
      code: of this process, at its end.
      reason: of a failure, for the others.
      orderly: the others end now, too.
    """
    if _watch is None:
        return
    if orderly:
        _watch.finish()
    else:
        _watch.fail(code, reason)
