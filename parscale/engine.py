"""The generation engine: many requests of different lengths, streams and layouts, in one batch.

A request is run by a script (`parscale.branches`, `parscale.layouts`). What all the scripts want
written goes through the model together, and so does what they want generated, a few tokens at a
time; requests come and go in between. Keys and values are in blocks of one pool for all
(`models.block_cache`), whatever their number of streams.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from models.config import ModelConfig, check_forks
from models.transformer import LanguageModel
from parscale import layouts
from parscale.block_memory import BlockMemory, OutOfBlocksError
from parscale.branches import Branch, Race, Write
from parscale.engine_rows import Group, Job
from parscale.sampling import GREEDY, Sampling
from sharding import rules
from sharding.settings import InputError

PROMPT_TOKENS = 512
"""Tokens of one row that are written in one pass at most."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody wants written.

    Attributes:
      prompt: token ids.
      tokens: how many new ones at most; of one branch, where a layout has several.
      sampling: how they are chosen.
      until: runs of tokens, the first of which to be generated ends the request.
      streams: P, where the engine has models of several; 0: of the only one.
      layout: the script that writes it.
    """

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = GREEDY
    until: frozenset[tuple[int, ...]] = frozenset()
    streams: int = 0
    layout: Callable[[Branch, "Request"], Iterator] = layouts.plain


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a request took.

    Attributes:
      generated: tokens, of all branches.
      longest: tokens that were generated one after the other, on the longest way.
      written: tokens of the prompt, and others that the layout put in.
    """

    generated: int
    longest: int
    written: int


@dataclasses.dataclass(frozen=True)
class Result:
    """How a request ended: its answer's tokens, or the error that it met."""

    tokens: list[int]
    ledger: Ledger
    error: Exception | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a branch of a request, or its result, which comes last."""

    request: int
    branch: int = 0
    tokens: tuple[int, ...] = ()
    result: Result | None = None


class _Active:
    """A request that runs; the owner of its branches."""

    def __init__(self, number: int, request: Request, group: Group, memory: BlockMemory):
        self.number, self.request, self.group, self.memory = number, request, group, memory
        self.told: dict[int, int] = {}
        self.promised = 0
        self.reset()

    def reset(self) -> None:
        """As it was before its first token; what was told stays told."""
        self.branches: list[Branch] = []
        self.stages: list[list[Job]] = []
        self.race = False
        self.generated = self.written = 0
        self.count: dict[int, int] = {}
        self.script: Iterator | None = None
        self.parts: tuple[int, ...] = ()

    def begin(self, row_part: int) -> None:
        self.parts = self.group.stream_parts(row_part)
        self.row_part = row_part
        root = self.new_branch()
        root.see(self.group.soft_entries[row_part])
        root.inherited = len(root.entries)
        root.states = self.group.first_states

    def new_branch(self) -> Branch:
        branch = Branch(self, len(self.branches))
        self.branches.append(branch)
        return branch

    def check_join(self) -> None:
        check_forks(self.group.config)

    def release(self) -> None:
        if hasattr(self.script, "close"):
            self.script.close()
        for branch in self.branches:
            branch.drop()
        self.memory.take_back(self.parts, self.promised)
        self.promised = 0

    @property
    def jobs(self) -> list[Job]:
        return self.stages[0] if self.stages else []

    def ledger(self) -> Ledger:
        longest = max((branch.chain for branch in self.branches), default=0)
        return Ledger(self.generated, longest, self.written)


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
        slots: int = 16,
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
        self._waiting: collections.deque[_Active] = collections.deque()
        self._active: dict[int, _Active] = {}
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
        active = _Active(number, request, group, self.memory)
        self.memory.check_fits(group.stream_parts(0), self._blocks_for(active), f"request {number}")
        self._waiting.append(active)
        return number

    def cancel(self, number: int) -> None:
        """Ends a request without a result; nothing happens if it has ended."""
        active = self._active.pop(number, None)
        if active is not None:
            self._end(active)
        self._waiting = collections.deque(a for a in self._waiting if a.number != number)

    def run(self) -> dict[int, Result]:
        """Runs until all requests have ended; gives the results of those that end meanwhile."""
        results = {}
        while not self.idle:
            results |= {e.request: e.result for e in self.step() if e.result is not None}
        return results

    def step(self) -> list[Event]:
        """One pass that writes, and one that generates; gives the new tokens and results."""
        self._events: list[Event] = []
        self._admit()
        wrote = self._write()
        generated = self._generate()
        for active in list(self._active.values()):
            if active.number in self._active:
                self._go_on(active)
        if not (wrote or generated or self._events) and self._active:
            self._make_room()
        return self._events

    def _blocks_for(self, active: _Active) -> int:
        """Of each stream, for a request that does not fork."""
        if not active.group.has_blocks:
            return 0
        request = active.request
        return -(-(len(request.prompt) + request.tokens) // self.slots)

    def _admit(self) -> None:
        while self._waiting:
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

    def _go_on(self, active: _Active) -> None:
        """Lets a script whose writes have ended go on to its next ones, or to its end."""
        try:
            while not self._busy(active):
                if active.stages:
                    active.stages.pop(0)
                if not active.stages:
                    if active.script is None:
                        active.script = active.request.layout(active.branches[0], active.request)
                    self._plan(active, next(active.script))
        except StopIteration as stop:
            tokens = [] if stop.value is None else list(stop.value)
            self._finish(active, Result(tokens, active.ledger()))
        except Exception as error:  # of somebody's script: the other requests go on
            self._fail(active, error)

    def _busy(self, active: _Active) -> bool:
        jobs = active.jobs
        ended = [job for job in jobs if job.ended]
        if active.race and ended and len(active.stages) == 1:
            for job in jobs:
                self._leave(job)
            return False
        return len(ended) < len(jobs)

    def _plan(self, active: _Active, step: Any) -> None:
        """Makes jobs of what a script yields: first what is left to write of what it joins."""
        writes = step.writes if isinstance(step, Race) else step
        _check_writes(active, writes)
        flush = {}
        for write in writes:
            for member in write.branch.members:
                if member.pending is not None:
                    flush[member.number] = Job(active, Write(member, ()))
        jobs = [Job(active, write) for write in writes]
        active.race = isinstance(step, Race)
        active.stages = [list(flush.values()), jobs] if flush else [jobs]

    def _finish(self, active: _Active, result: Result) -> None:
        del self._active[active.number]
        self._end(active)
        self._events.append(Event(active.number, result=result))

    def _fail(self, active: _Active, error: Exception) -> None:
        if isinstance(error, InputError):
            error = InputError(f"request {active.number}: {error}")
        self._finish(active, Result([], active.ledger(), error))

    def _end(self, active: _Active) -> None:
        for job in active.jobs:
            self._leave(job)
        active.release()

    def _leave(self, job: Job) -> None:
        """Ends a job where it is."""
        if not job.ended:
            job.ended = True
            if job.row is not None:
                job.group.unseat(job)

    def _make_room(self) -> None:
        """No request can go on: the youngest begins again later; a single one cannot be served."""
        active = self._active[max(self._active)]
        if len(self._active) == 1:
            self._fail(
                active,
                InputError(
                    f"its branches need more than the cache's {self.memory.blocks - 1} blocks: "
                    "give the cache more tokens, or fork less"
                ),
            )
            return
        del self._active[active.number]
        self._end(active)
        active.reset()
        self._waiting.appendleft(active)

    def _wanted(self) -> Iterator[Job]:
        for active in self._active.values():
            for job in active.jobs:
                if not job.ended:
                    yield job

    def _write(self) -> bool:
        """Writes tokens of as many jobs as one pass takes; whether there was any."""
        jobs = [job for job in self._wanted() if job.begin() and job.left]
        jobs = [job for job in jobs if self._has_room(job, min(len(job.left), PROMPT_TOKENS))]
        if not jobs:
            return False
        first = jobs[0]
        shape = first.shape(PROMPT_TOKENS)
        alike = [job for job in jobs if job.shape(PROMPT_TOKENS) == shape]
        self.pools, done = first.group.write(self.pools, alike, PROMPT_TOKENS)
        for job, token in done:
            if not job.left and job.write.most:
                self._take(job, [token])
            elif not job.left:
                job.ended = True
        return True

    def _generate(self) -> bool:
        """Generates tokens of all jobs that are seated; whether there was any."""
        any_done = False
        for group in self._groups.values():
            jobs = [job for job in self._wanted() if job.group is group and job.is_generating]
            for job in jobs:
                if job.row is None:
                    group.seat(job)
            jobs = [job for job in jobs if job.row is not None]
            steps = 1 if any(job.branch.sees is not None for job in jobs) else self.burst
            jobs = [job for job in jobs if self._has_room(job, min(steps, job.most))]
            if not jobs:
                continue
            any_done = True
            self.pools, new = group.generate(self.pools, jobs, steps)
            for job, tokens in zip(jobs, new, strict=True):
                self._take(job, tokens)
        return any_done

    def _take(self, job: Job, tokens: list[int]) -> None:
        """Notes what a job has generated."""
        branch, active = job.branch, job.active
        branch.new += tokens
        branch.pending = tokens[-1]
        branch.chain += len(tokens)
        active.generated += len(tokens)
        job.most -= len(tokens)
        if job.most == 0 or job.has_met_end:
            self._leave(job)
        # What a request that began again had told before is not told twice.
        count = active.count[branch.number] = active.count.get(branch.number, 0) + len(tokens)
        untold = count - active.told.get(branch.number, 0)
        if untold > 0:
            active.told[branch.number] = count
            self._events.append(Event(active.number, branch.number, tuple(tokens[-untold:])))

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


def check_prompt(config: ModelConfig, what: str, prompt: Sequence[int], tokens: int) -> None:
    """Raises InputError if a model cannot go on from a prompt for so many tokens.

    Args:
      config: of the model.
      what: how the message calls the prompt.
      prompt: token ids.
      tokens: new ones.
    """
    if tokens < 1:
        raise InputError(f"{what}: tokens={tokens}: expected at least 1")
    if not len(prompt):
        raise InputError(f"{what} is empty: give at least one character")
    check_ids(config, what, prompt)
    if len(prompt) + tokens > config.max_length:
        raise InputError(
            f"{what} of {len(prompt)} tokens and {tokens} new ones are more than the model's "
            f"max_length={config.max_length}"
        )


def check_ids(config: ModelConfig, what: str, ids: Sequence[int]) -> None:
    """Raises InputError if some of these are no tokens of a model."""
    wrong = [token for token in ids if not 0 <= token < config.vocab_size]
    if wrong:
        raise InputError(
            f"{what} has token id {wrong[0]}, but the model's vocabulary is {config.vocab_size}: "
            "was it tokenised with another tokenizer?"
        )


def _check_writes(active: _Active, writes: Any) -> None:
    """Raises InputError if a script yields what cannot be written."""
    config = active.group.config
    if not isinstance(writes, list | tuple) or not writes:
        raise InputError(
            f"its layout yields {writes!r}: expected a list of what Branch.write gives"
        )
    for write in writes:
        if not isinstance(write, Write):
            raise InputError(
                f"its layout yields a list with {write!r}: expected what Branch.write gives"
            )
        branch = write.branch
        what = f"the write to branch {branch.number}"
        if branch.owner is not active:
            raise InputError(f"{what} is to a branch of another request")
        branch.check_alive("write")
        if write.most < 0:
            raise InputError(f"{what} generates {write.most} tokens: expected 0 or more")
        if not write.tokens and branch.pending is None:
            raise InputError(f"{what} has no token to go on from: give it some")
        check_ids(config, what, write.tokens)
        end = branch.end + len(write.tokens) + write.most
        if branch.position < 0 or end > config.max_length:
            raise InputError(
                f"{what} would go from position {branch.position} to {end}, but the model's "
                f"max_length is {config.max_length}"
            )
    numbers = [write.branch.number for write in writes]
    if len(set(numbers)) < len(numbers):
        raise InputError(f"its layout writes to branches {numbers} at once: expected each once")


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
