"""The threads by which each of several processes shows that it lives, and learns that one does not.

Every process shows once a second that it lives, in the key-value store of JAX's coordination
service. One that stays silent is lost; one that fails says so. Either way all others print one
line that names it, and end with a non-zero code, so that whatever started them can start all of
them again. JAX's own heartbeat ends them, too, but with a stack trace.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from typing import Any

ROOT = "parscale"
FOREVER = 30 * 24 * 3600.0
"""Seconds; waiting is ended by the watch, not by a time limit."""

GO_ON = "the same command on every host goes on from the last checkpoint"


class Watch:
    """The threads that show that this process lives, and learn what became of the others."""

    def __init__(self, heartbeat: float):
        from jax._src import distributed

        state = distributed.global_state
        self.client, self.process, self.count = state.client, state.process_id, state.num_processes
        self.heartbeat = heartbeat
        self.period = min(1.0, heartbeat / 4)
        self._coordinator = state.coordinator_address
        self._left = threading.Event()
        self._answered = time.monotonic()
        self.client.key_value_set(f"{ROOT}/host/{self.process}", socket.gethostname())
        self._host_0 = self.client.blocking_key_value_get(f"{ROOT}/host/0", int(FOREVER * 1e3))
        for loop in (self._beat, self._look, self._listen, self._hold):
            threading.Thread(target=loop, daemon=True, name=f"hosts{loop.__name__}").start()

    def _beat(self) -> None:
        for number in itertools.count():
            with contextlib.suppress(RuntimeError):
                self.client.key_value_set(f"{ROOT}/beat/{self.process}", str(number), True)
                self._answered = time.monotonic()
            if self._left.wait(self.period):
                return

    def _look(self) -> None:
        """Process 0 looks after all others, and they after it, which serves the store."""
        now = time.monotonic()
        changed = dict.fromkeys(range(self.count), ("", now))
        while not self._left.wait(self.period):
            before, now = now, time.monotonic()
            if now - before > self.heartbeat / 2:
                # It was this process that stood still: what it heard of the others is too old.
                changed = {process: (beat, now) for process, (beat, _) in changed.items()}
                self._answered = now
            if self.process:
                if now - self._answered > self.heartbeat:
                    self._end(_lost(0, self._host_0, f"no answer for {self.heartbeat:g} s"))
                continue
            with contextlib.suppress(RuntimeError):
                for key, beat in self.client.key_value_dir_get(f"{ROOT}/beat"):
                    process = int(key.rpartition("/")[2])
                    if beat != changed[process][0]:
                        changed[process] = beat, now
            silent = [process for process in changed if now - changed[process][1] > self.heartbeat]
            if silent:
                why = f"no sign of life for {self.heartbeat:g} s"
                if silent[1:]:
                    why += f" (nor from {', '.join(map(str, silent[1:]))})"
                host = self.client.key_value_try_get(f"{ROOT}/host/{silent[0]}")
                self._tell(_lost(silent[0], host, why))
                return

    def _listen(self) -> None:
        """Waits for the news that ends the run."""
        while not self._left.is_set():
            with contextlib.suppress(RuntimeError):
                end = self.client.blocking_key_value_get(f"{ROOT}/end", int(FOREVER * 1e3))
                news = json.loads(end)
                if not self._left.is_set() and news["process"] != self.process:
                    self._end(news)
                return
            self._left.wait(self.period)

    def _hold(self) -> None:
        """Notices at once when process 0 ends, by a connection that nothing is said over.

        JAX notices, too, and aborts, often on the thread that would tell any other.
        """
        host, _, port = self._coordinator.rpartition(":")
        while self.process and not self._left.is_set():
            try:
                line = socket.create_connection((host.strip("[]"), int(port)), self.heartbeat)
            except OSError:
                if not self._left.is_set():
                    self._end(_lost(0, self._host_0, "it takes no connections"))
                return
            with line, contextlib.suppress(OSError):
                line.settimeout(None)
                while line.recv(4096):
                    pass
            self._left.wait(0.05)

    def _tell(self, news: dict[str, Any]) -> None:
        """Makes the news known, unless other news came first."""
        with contextlib.suppress(RuntimeError):
            self.client.key_value_set(f"{ROOT}/end", json.dumps(news))
        if news["process"] != self.process:
            time.sleep(2 * self.period)  # `_listen` ends this process

    def _end(self, news: dict[str, Any]) -> None:
        say(f"error: {news['text']}")
        self._exit(news["code"], news["lost"])

    def _exit(self, code: int, lost: int | None = None) -> None:
        """Ends this process at once: its collectives, and JAX's own farewell, would hang."""
        with contextlib.suppress(RuntimeError):
            if lost == 0:
                os._exit(code)  # nobody to tell
            elif self.process:
                self.client.key_value_set(f"{ROOT}/gone/{self.process}", "")
            else:
                # With process 0 goes the store in which the others read why.
                deadline = time.monotonic() + 1
                others = self.count - 1 - (lost is not None)
                while time.monotonic() < deadline:
                    if len(self.client.key_value_dir_get(f"{ROOT}/gone")) >= others:
                        break
                    time.sleep(0.05)
        os._exit(code)

    def finish(self) -> None:
        """The orderly end."""
        import jax

        self.client.wait_at_barrier(f"{ROOT}/leave", int(FOREVER * 1e3))
        self._left.set()
        if self.process == 0:
            self.client.key_value_set(f"{ROOT}/end", json.dumps({"process": -1}))
        jax.distributed.shutdown()

    def fail(self, code: int, reason: str) -> None:
        """Tells the others that this process failed, and ends it."""
        sys.stdout.flush()
        sys.stderr.flush()
        if not self._all_fail(self.heartbeat + 2 * self.period if code == 1 else 2.0):
            text = f"process {self.process} on {socket.gethostname()} failed: "
            text += reason or "its own output says why"
            self._tell({"process": self.process, "code": code, "text": text, "lost": None})
        self._exit(code)

    def _all_fail(self, seconds: float) -> bool:
        """Whether every process fails by itself, as all do whose input is the same and bad.

        The time until that is known lets the watch find out, too, that another process was lost:
        then its loss is why this one fails, and this process ends here.
        """
        deadline = time.monotonic() + seconds
        with contextlib.suppress(RuntimeError):
            self.client.key_value_set(f"{ROOT}/failing/{self.process}", "", True)
            while time.monotonic() < deadline:
                if len(self.client.key_value_dir_get(f"{ROOT}/failing")) == self.count:
                    return True
                time.sleep(0.05)
        return False


def _lost(process: int, host: str, why: str) -> dict[str, Any]:
    text = f"process {process} on {host} was lost: {why}; {GO_ON}"
    return {"process": process, "code": 1, "text": text, "lost": process}


def say(line: str) -> None:
    """One line on stderr, past any lock that a thread which hangs may hold."""
    os.write(2, (line.replace("\n", " ") + "\n").encode())
