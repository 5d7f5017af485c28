"""The generation engine: many requests of different lengths, streams and layouts, in one batch.

A request is run by a script (`parscale.branches`, `parscale.layouts`). What all the scripts want
written goes through the model together, and so does what they want generated, a few tokens at a
time; requests come and go in between. Keys and values are in blocks of one pool for all
(`models.block_cache`), whatever their number of streams.
"""

import collections
from collections.abc import Mapping
from typing import Any

from models.transformer import LanguageModel
from parscale.block_memory import BlockMemory, OutOfBlocksError
from parscale.engine_jobs import Active, Job
from parscale.engine_rows import Group
from parscale.requests import Event, Ledger, Request, Result, check_prompt
from sharding import rules
from sharding.settings import InputError

__all__ = ["SLOTS", "Engine", "Event", "Ledger", "Request", "Result", "check_prompt"]

SLOTS = 16
"""Tokens in a block of the cache, where nothing else is asked for."""

PROMPT_TOKENS = 512
"""Tokens of one row that are written in one pass at most."""


class Engine:
    """Runs requests.

    `submit` takes them at any time; `step` does one pass for those that can go on and gives what is
    new; `run` does so until all are done. On a mesh everything is to be called under
    `jax.set_mesh`.
    """

    def __init__(
        self,
        models: LanguageModel | Mapping[int, LanguageModel],
        *,
        cache_tokens: int,
        rows: int = 16,
        slots: int = SLOTS,
        burst: int = 8,
    ):
        """An engine without requests.

        Args:
          models: a model, or some with different numbers of streams (and else the same shape) by
            that number.
          cache_tokens: how many tokens of one stream the cache holds.
          rows: branches that generate at the same time at most, for each number of streams.
          slots: tokens in a block of the cache.
          burst: tokens that are generated between two looks at what has changed.

        Raises:
          InputError: a number that is too small, or models that do not go together.
        """
        for name, value in (
            ("cache_tokens", cache_tokens), ("rows", rows), ("slots", slots), ("burst", burst),
        ):  # fmt: skip
            if value < 1:
                raise InputError(f"{name}={value}: expected at least 1")
        if not isinstance(models, Mapping):
            models = {models.config.streams: models}
        _check_family(models)
        self.slots, self.burst = slots, burst
        self._row_parts = rules.parts("batch")
        parts = self._row_parts * rules.parts("streams")
        blocks = 1 + -(-cache_tokens // (slots * parts))
        self.memory = BlockMemory(blocks, parts)
        rows = -(-rows // self._row_parts) * self._row_parts
        self._groups: dict[int, Group] = {}
        self.pools: Any = None
        for streams, model in sorted(models.items()):
            group = Group(model, rows, self.memory, slots)
            if self.pools is None:
                self.pools = group.new_pools(blocks * parts)
            self.pools = group.begin(self.pools)
            self._groups[streams] = group
        self._waiting: collections.deque[Active] = collections.deque()
        self._active: dict[int, Active] = {}
        self._events: list[Event] = []
        self._crowded = False  # a request had to begin again; none begins before another has ended
        self._next_number = 0

    @property
    def idle(self) -> bool:
        """Whether no request is left."""
        return not self._waiting and not self._active

    def submit(self, request: Request) -> int:
        """Takes a request.

        Returns:
          its number.

        Raises:
          InputError: it could never be run: an empty prompt, an id outside the vocabulary, more
            positions than the model has, more than the whole cache, or streams without a model.
            Names the request by its number; the others go on.
        """
        number = self._next_number
        self._next_number += 1
        if request.streams not in self._groups and (request.streams or len(self._groups) > 1):
            raise InputError(
                f"request {number} wants streams={request.streams}: the engine has models of "
                + ", ".join(map(str, self._groups))
            )
        group = self._groups[request.streams or next(iter(self._groups))]
        check_prompt(group.config, f"request {number}", request.prompt, request.tokens)
        active = Active(number, request, group, self.memory)
        needed, most = self._blocks_for(active), self.memory.most(group.stream_parts(0))
        if needed > most:
            raise InputError(
                f"request {number} needs {needed} blocks of the cache for each stream, which has "
                f"{most} of {self.slots} tokens: raise cache_tokens, or ask for less"
            )
        self._waiting.append(active)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request without a result; nothing happens if it has ended."""
        active = self._active.pop(number, None)
        if active is not None:
            active.release()
            self._crowded = False
        self._waiting = collections.deque(a for a in self._waiting if a.number != number)

    def run(self) -> dict[int, Result]:
        """Runs until all requests have ended; gives the results of those that end meanwhile."""
        results = {}
        while not self.idle:
            results |= {e.request: e.result for e in self.step() if e.result is not None}
        return results

    def step(self) -> list[Event]:
        """One pass that writes, and one that generates; gives the new tokens and results."""
        self._events = []
        self._admit()
        wrote = self._write()
        generated = self._generate()
        for active in list(self._active.values()):
            self._go_on(active)
        if not (wrote or generated or self._events) and self._active:
            self._make_room()
        return self._events

    def _blocks_for(self, active: Active) -> int:
        """Of each stream, for a request that does not fork."""
        if not active.group.has_blocks:
            return 0
        request = active.request
        return -(-(len(request.prompt) + request.tokens) // self.slots)

    def _admit(self) -> None:
        """Begins requests in their order, while the cache has room for the next."""
        while self._waiting and not (self._crowded and self._active):
            active = self._waiting[0]
            blocks = self._blocks_for(active)
            fits = (
                part
                for part in self._parts_by_use()
                if self.memory.can_promise(active.group.stream_parts(part), blocks)
            )
            part = next(fits, None)
            if part is None:
                return
            self._waiting.popleft()
            self._active[active.number] = active
            active.begin(part)
            self.memory.promise(active.parts, blocks)
            active.promised = blocks
            self._go_on(active)

    def _parts_by_use(self) -> list[int]:
        """Parts of the rows, that with the fewest requests first."""
        used = collections.Counter(active.row_part for active in self._active.values())
        return sorted(range(self._row_parts), key=lambda part: used[part])

    def _go_on(self, active: Active) -> None:
        result = active.go_on()
        if result is not None and active.number in self._active:
            self._finish(active, result)

    def _finish(self, active: Active, result: Result) -> None:
        del self._active[active.number]
        active.release()
        self._crowded = False
        self._events.append(Event(active.number, result=result))

    def _make_room(self) -> None:
        """No request can go on: the youngest begins again later; a single one cannot be served."""
        active = self._active[max(self._active)]
        if len(self._active) == 1:
            error = InputError(
                f"its branches need more than the {self.memory.most(active.parts)} blocks that the "
                "cache has for each stream: give it more tokens, or fork less"
            )
            self._finish(active, active.failure(error))
            return
        del self._active[active.number]
        active.release()
        active.reset()
        self._waiting.appendleft(active)
        self._crowded = True

    def _write(self) -> bool:
        """Writes tokens of as many jobs as one pass takes; whether there was any."""
        jobs = [job for active in self._active.values() for job in active.writing()]
        jobs = [job for job in jobs if self._has_room(job, min(job.left, PROMPT_TOKENS))]
        if not jobs:
            return False
        group = jobs[0].group
        jobs = [job for job in jobs if job.group is group]
        shape = group.shape(jobs[0], PROMPT_TOKENS)
        alike = [job for job in jobs if group.shape(job, PROMPT_TOKENS) == shape]
        self.pools, done = group.write(self.pools, alike, PROMPT_TOKENS)
        for job, token in done:
            if not job.left and job.most:
                self._take(job, [token])
            elif not job.left:
                job.leave()
        return True

    def _generate(self) -> bool:
        """Generates tokens of all jobs that have rows; whether there was any."""
        any_done = False
        for group in self._groups.values():
            ready, full = [], set()
            for active in self._active.values():
                if active.group is group:
                    ready.append(self._seated(active, full))
            in_line = any(jobs and jobs[0].active.in_line for jobs in ready)
            steps = 1 if in_line else self.burst
            jobs = [job for some in ready for job in self._with_room(some, steps)]
            if not jobs:
                continue
            any_done = True
            self.pools, new = group.generate(self.pools, jobs, steps)
            for job, tokens in zip(jobs, new, strict=True):
                self._take(job, tokens)
        return any_done

    def _seated(self, active: Active, full: set[int]) -> list[Job]:
        """The jobs of a request that have rows to generate in, for which it takes free ones.

        Of a part of the rows that is `full`, those who come later get none.
        """
        jobs, part = active.generating(), active.row_part
        unseated = [job for job in jobs if job.row is None]
        free = [] if part in full or not unseated else active.group.free_rows(part)
        if len(free) < len(unseated):
            full.add(part)
            if active.together:
                return []
        for job, row in zip(unseated, free, strict=False):
            active.group.seat(job, row)
        return [job for job in jobs if job.row is not None]

    def _with_room(self, jobs: list[Job], steps: int) -> list[Job]:
        """Those of a request's jobs that have blocks; of jobs that go together all or none."""
        having = [job for job in jobs if self._has_room(job, min(steps, job.most))]
        return having if len(having) == len(jobs) or not jobs[0].active.together else []

    def _take(self, job: Job, tokens: list[int]) -> None:
        """Notes what a job has generated."""
        job.take(tokens)
        active, branch = job.active, job.branch
        untold = active.untold(branch, tokens)
        if untold:
            self._events.append(Event(active.number, branch.number, tuple(untold)))

    def _has_room(self, job: Job, count: int) -> bool:
        """Whether the job's branch has blocks for so many more tokens, which it then holds."""
        active = job.active
        try:
            for _ in range(job.missing_blocks(count)):
                promised = active.promised > 0
                if promised:
                    active.promised -= 1
                    self.memory.take_back(active.parts, 1)
                blocks = self.memory.allocate(job.parts, promised=promised)
                job.branch.spare.append(job.spread(blocks))
        except OutOfBlocksError:
            return False
        return True


def _check_family(models: Mapping[int, LanguageModel]) -> None:
    """Raises InputError if models cannot share a cache."""
    if not models:
        raise InputError("an engine without a model")
    names = ("layers", "mixers", "kv_heads", "head_dim", "dtype", "vocab_size", "layer_loop")
    first = next(iter(models.values())).config
    for streams, model in models.items():
        if model.config.streams != streams:
            raise InputError(f"the model for streams={streams} has {model.config.streams}")
        for name in names:
            have, other = getattr(first, name), getattr(model.config, name)
            if have != other:
                raise InputError(
                    f"models of one engine have {name}={have} and {other}: expected the same"
                )
