"""Keeps out of sight what the threads of a failed save print after it."""

import contextlib
import sys
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_late_writes() -> Iterator[None]:
    """Inside, threads that report to a writer which has given up print no traceback.

    When one file of a checkpoint cannot be written, orbax raises and closes its event loop; each of
    the hundreds of writes still under way then ends in a traceback of its own on stderr, straight
    from tensorstore. The failure itself is raised, once, as `SaveError`.
    """
    before = sys.unraisablehook

    def hook(unraisable):
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
    finally:
        sys.unraisablehook = before
