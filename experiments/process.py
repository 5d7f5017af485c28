"""What every program does to its own process: allocator, devices, signals, closed pipes.

Nothing imported here imports jax, as in `experiments.program`.
"""

import glob
import os
import signal
import sys

from sharding import hosts
from sharding.settings import InputError

ALLOCATOR = (
    "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.arena_max=1"
)
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")


def tune_allocator() -> None:
    """Restarts this process once with an allocator that keeps freed memory, on Linux without GPU.

    XLA on CPU frees and maps its temporary arena at every step; keeping it is worth 16 to 20 % of a
    training step, at the price of a resident size that does not shrink. The process id, the command
    line and the working directory stay. Nothing happens where GLIBC_TUNABLES or
    PARSCALE_KEEP_ALLOCATOR is set, or where an accelerator is asked for or found.

    Many fake CPU devices on few cores hang XLA unless it has a thread for each; so NPROC is set
    where JAX_NUM_CPU_DEVICES asks for some.
    """
    if os.environ.get("JAX_NUM_CPU_DEVICES", "1") != "1":
        os.environ.setdefault("NPROC", "32")
    if {"GLIBC_TUNABLES", "PARSCALE_KEEP_ALLOCATOR"} & os.environ.keys():
        return
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms != "cpu" and (platforms or any(map(glob.glob, ACCELERATORS))):
        return
    # What came by `-c` or standard input cannot be started a second time.
    if not hasattr(sys.modules["__main__"], "__file__") or not _is_glibc():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    # Else an installed libtpu looks for its chips, and complains that there are none.
    environment = os.environ | {"GLIBC_TUNABLES": ALLOCATOR, "JAX_PLATFORMS": "cpu"}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def _is_glibc() -> bool:
    try:
        return bool(os.confstr("CS_GNU_LIBC_VERSION"))
    except (AttributeError, ValueError, OSError):
        return False


def check_device_count() -> None:
    """Raises InputError for a JAX_NUM_CPU_DEVICES that jax could not read."""
    count = os.environ.get("JAX_NUM_CPU_DEVICES", "1")
    if not count.isdecimal() or int(count) < 1:
        raise InputError(f"JAX_NUM_CPU_DEVICES={count}: expected a number of devices, at least 1")


def refused_platform() -> InputError | None:
    """What to say where jax has no device of the platforms asked for; None where it has.

    It is asked only after a failure: the answer takes a second, and has to wait for `hosts.start`.
    """
    platforms, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not platforms or jax is None or hosts.several():
        return None
    try:
        jax.devices()
    except Exception as error:  # an AssertionError among others
        why = f" ({error})" if str(error) else ""
        return InputError(
            f"JAX_PLATFORMS={platforms}: jax finds no such device here{why}; leave it out to take "
            "what there is, or install jax for it: pip install -e '.[gpu]' or '.[tpu]'"
        )
    return None


class Interruption:
    """Records SIGINT and SIGTERM inside a `with` block, so that a loop can stop when it suits.

    A second signal of the same kind is not waited for: the default action is restored and taken.

    Attributes:
      requested: the first signal that came, or None.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, *signals: int):
        """Records these signals; both by default."""
        self.signals = signals or self.signals
        self.requested: int | None = None
        self._seen: set[int] = set()
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._record)
        return self

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _record(self, number, frame) -> None:
        if number in self._seen:
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)
                raise KeyboardInterrupt
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._seen.add(number)
        self.requested = self.requested or number

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, 0 if neither came."""
        return 128 + self.requested if self.requested else 0


def leave_closed_pipe() -> None:
    """The reader, say `head`, has seen enough: what is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
