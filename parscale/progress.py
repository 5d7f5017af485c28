"""Live progress: one updating line on a terminal, plain lines now and then anywhere else."""

import sys
import time
from typing import TextIO

import tqdm


class Progress:
    """Shows step, loss, tokens/s and the time that is left. A context manager.

    Speed, and with it the time left, are of this process alone: the steps before a restart may
    have run elsewhere. Elapsed time includes what went before.
    """

    def __init__(
        self,
        steps: int,
        *,
        first: int = 0,
        elapsed: float = 0.0,
        every: int = 10,
        seconds: float = 30.0,
        file: TextIO | None = None,
    ):
        """Starts the clock.

        Args:
          steps: of the whole run.
          first: steps already done.
          elapsed: seconds of training before this process.
          every: steps between plain lines; they also come after `seconds` without one.
          seconds: most seconds between plain lines.
          file: where to show it; stderr by default.
        """
        self.steps, self.every, self.seconds = steps, every, seconds
        self._elapsed = elapsed
        self._file = sys.stderr if file is None else file
        self._start = self._last_line = time.monotonic()
        self._last_step = first
        self._tokens = 0
        self._shown: tuple[int, float] | None = None  # the first step shown, and when
        self._bar = None
        if self._file.isatty():
            self._bar = tqdm.tqdm(
                total=steps,
                initial=first,
                file=self._file,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {desc}",
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.close()

    def elapsed(self) -> float:
        """Seconds of training, those before this process included."""
        return self._elapsed + time.monotonic() - self._start

    def eta(self, step: int) -> float | None:
        """Seconds left after `step`; None until there is something to go by.

        The speed is this process's since the first step it showed, which had to be compiled.
        """
        if step == self.steps:
            return 0.0
        if self._shown is None or step <= self._shown[0]:
            return None
        first, begun = self._shown
        return (time.monotonic() - begun) / (step - first) * (self.steps - step)

    def update(self, step: int, loss: float, tokens: int) -> None:
        """Shows that `step` is done.

        Args:
          step: steps done.
          loss: nats per token.
          tokens: those of the steps since the last update.
        """
        self._tokens += tokens
        now = time.monotonic()
        self._shown = self._shown or (step, now)
        if self._bar is not None:
            self._bar.set_description_str(self._text(step, loss, now), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        due = step // self.every > self._last_step // self.every
        if due or now - self._last_line >= self.seconds or step == self.steps:
            self._last_line, self._last_step = now, step
            print(self._text(step, loss, now), file=self._file, flush=True)

    def print(self, text: str) -> None:
        """Writes a line of its own, above the live one where there is one."""
        if self._bar is not None:
            self._bar.write(text, file=self._file)
        else:
            print(text, file=self._file, flush=True)

    def close(self) -> None:
        """Leaves the last state standing and ends the line."""
        if self._bar is not None:
            self._bar.close()

    def _text(self, step: int, loss: float, now: float) -> str:
        speed = self._tokens / max(now - self._start, 1e-9)
        eta = self.eta(step)
        left = "?" if eta is None else format_seconds(eta)
        return (
            f"step {step}/{self.steps}  loss {loss:.4f}  {speed:,.0f} tokens/s  "
            f"elapsed {format_seconds(self.elapsed())}  ETA {left}"
        )


def format_seconds(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`, `3d04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02}h"
