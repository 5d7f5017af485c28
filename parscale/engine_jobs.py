"""Requests that run: where their scripts are, and the writes that are being done for them."""

import contextlib
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from models.config import check_forks
from parscale.block_memory import BlockMemory
from parscale.branches import Branch, Race, Token, Write, gather
from parscale.engine_rows import Group
from parscale.requests import Ledger, Request, Result, check_ids
from sharding.settings import InputError


class Job:
    """A write that is being done.

    Attributes:
      active: the request.
      write, branch: what and where.
      text: int32 `[3, n]`, the tokens that are not written yet, their positions and marks.
      again: whether that is one token that is in the cache already, read for what follows it.
      most: tokens that may still be generated.
      row: where it generates.
      ended: whether it is done.
    """

    def __init__(self, active: "Active", write: Write):
        self.active, self.write, self.branch = active, write, write.branch
        self.group = active.group
        self.most = write.most
        self.row: int | None = None
        branch = write.branch
        gather(branch)
        begin, pending = branch.position, branch.pending
        text = [[token, begin + n, branch.mark] for n, token in enumerate(write.tokens)]
        moved = pending and (begin, branch.mark) != (branch.reached, pending.mark)
        if pending and (write.tokens or not write.most or moved):
            text = [pending, *text]
        self.again = not (text or pending) and write.most > 0
        if self.again:
            text = [branch.last]
        if text:
            branch.last, branch.cached = Token(*text[-1]), True
        self.text = np.array(text, np.int32).reshape(-1, 3).T
        branch.position = branch.reached = begin + len(write.tokens)
        self.ended = not self.left and not self.most
        if write.tokens or write.most:
            branch.new = []
        if write.tokens:
            branch.run = []
        branch.set_shared(write.shared)
        active.written += len(write.tokens)

    def write_pending(self) -> None:
        """Has its branch's last token written as given ones are, if it is not in the cache."""
        pending = self.branch.pending
        if pending and not self.left:
            self.text = np.array([pending], np.int32).T
            self.branch.cached = True

    @property
    def left(self) -> int:
        """How many tokens are not written yet."""
        return self.text.shape[1]

    def take(self, tokens: list[int]) -> None:
        """Notes what it has generated."""
        branch, self.most = self.branch, self.most - len(tokens)
        branch.new += tokens
        branch.run += tokens
        branch.position += len(tokens)
        branch.reached = branch.position
        branch.last = Token(tokens[-1], branch.position - 1, branch.mark)
        branch.cached = False
        branch.chain += len(tokens)
        ends = self.write.until
        if not self.most or any(tuple(branch.run[-len(end) :]) == end for end in ends):
            self.leave()

    def leave(self) -> None:
        """Ends it where it is."""
        if not self.ended:
            self.ended = True
            if self.row is not None:
                self.group.unseat(self)

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts of the cache that a block of each stream is taken from."""
        parts = self.active.parts
        return parts[:1] if self.write.shared else parts

    def spread(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """The blocks of all streams, given those of `parts`."""
        return blocks * len(self.active.parts) if self.write.shared else blocks

    def missing_blocks(self, count: int) -> int:
        """Blocks that its branch needs for `count` more tokens and has not."""
        if not self.group.has_blocks:
            return 0
        slots = self.group.slots
        room = slots * len(self.branch.spare)
        if self.branch.grows:
            room += slots - self.branch.entries[-1].count
        return max(0, -(-(count - room) // slots))


class Active:
    """A request that runs; the owner of its branches.

    Attributes:
      jobs: the writes of the script's present step.
      race: whether the first of them to end stops the others.
      in_line: whether some of them see others; they are then written one after the other.
    """

    def __init__(self, number: int, request: Request, group: Group, memory: BlockMemory):
        self.number, self.request, self.group, self.memory = number, request, group, memory
        self.told: dict[int, int] = {}
        self.promised = 0
        self.reset()

    def reset(self) -> None:
        """As it was before its first token; what was told stays told."""
        self.branches: list[Branch] = []
        self.jobs: list[Job] = []
        self.race = self.in_line = False
        self._stages: list[Sequence[Write]] = []
        self._script: Iterator | None = None
        self.generated = self.written = 0
        self._count: dict[int, int] = {}
        self.parts: tuple[int, ...] = ()

    def begin(self, row_part: int) -> None:
        """Gives it a part of the rows, and of the cache."""
        self.row_part, self.parts = row_part, self.group.stream_parts(row_part)
        self.new_branch().states = self.group.first_states

    def go_on(self) -> Result | None:
        """Lets a script whose writes have ended go on; its result, at the end."""
        try:
            while self._step_has_ended():
                if not self._stages:
                    if self._script is None:
                        self._script = self._begin_script()
                    try:
                        step = next(self._script)
                    except StopIteration as stop:
                        return Result(_answer(stop.value), self.ledger())
                    self._plan(step)
                writes = self._stages.pop(0)
                if not self._stages:
                    for write in writes:
                        for follower in list(write.branch.followers):
                            gather(follower)
                self.jobs = [Job(self, write) for write in writes]
                if self.race and any(job.left for job in self.jobs):
                    for job in self.jobs:  # each then has one token when they go on side by side
                        job.write_pending()
        except Exception as error:  # of somebody's script: the other requests go on
            return self.failure(error)
        return None

    def failure(self, error: Exception) -> Result:
        """The result of a request that met an error."""
        if not isinstance(error, InputError):
            error = f"its layout raised {type(error).__name__}: {error}"
        named = InputError(f"request {self.number}: {error}")
        named.__cause__ = error if isinstance(error, Exception) else None
        return Result([], self.ledger(), named)

    def new_branch(self) -> Branch:
        branch = Branch(self, len(self.branches))
        self.branches.append(branch)
        return branch

    @property
    def joins(self) -> bool:
        """Whether its model can go on from several branches."""
        return set(self.group.config.mixers) == {"attention"}

    def check_forks(self) -> None:
        """Raises InputError if its model reads a text in one line."""
        check_forks(self.group.config)

    def release(self) -> None:
        """Ends its jobs and gives back what it holds."""
        for job in self.jobs:
            job.leave()
        for branch in self.branches:
            branch.drop()
        self.memory.take_back(self.parts, self.promised)
        self.promised = 0
        script, self._script = self._script, None
        if script is not None:
            with contextlib.suppress(Exception):  # it has no say any more
                script.close()

    def ledger(self) -> Ledger:
        """What it took so far."""
        longest = max((branch.chain for branch in self.branches), default=0)
        return Ledger(self.generated, longest, self.written)

    def untold(self, branch: Branch, tokens: list[int]) -> list[int]:
        """Those of a branch's new tokens that were not told before the request began again."""
        self.generated += len(tokens)
        count = self._count[branch.number] = self._count.get(branch.number, 0) + len(tokens)
        untold = count - self.told.get(branch.number, 0)
        if untold <= 0:
            return []
        self.told[branch.number] = count
        return tokens[-untold:]

    def writing(self) -> list[Job]:
        """Its jobs that have tokens to write now."""
        jobs = [job for job in self.jobs if job.left]
        return jobs[:1] if self.in_line else jobs

    def generating(self) -> list[Job]:
        """Its jobs that have nothing left but to generate: all of them or none, if `together`."""
        if self.together and any(job.left for job in self.jobs):
            return []
        if self.race and any(job.ended for job in self.jobs):
            return []  # by its first token: the others stop there too
        return [job for job in self.jobs if not job.ended and not job.left]

    @property
    def together(self) -> bool:
        """Whether its jobs have to generate side by side."""
        return self.race or self.in_line

    def _begin_script(self) -> Iterator:
        script = self.request.layout(self.branches[0], self.request)
        if not isinstance(script, Iterator) or not hasattr(script, "close"):
            raise InputError(f"its layout gives {script!r}: expected a generator, as of a function")
        return script

    def _step_has_ended(self) -> bool:
        jobs = self.jobs
        if self.race and not any(job.left for job in jobs) and any(job.ended for job in jobs):
            for job in jobs:
                job.leave()
        return all(job.ended for job in jobs)

    def _plan(self, step: Any) -> None:
        """Notes what a script yields: first what is left to write for those who will see it."""
        writes = step.writes if isinstance(step, Race) else step
        self._check_writes(writes)
        flush = {}
        for write in writes:
            # A branch that is only seen keeps its last token: it may have to go on from it.
            branch = write.branch
            for follower in (branch, *branch.followers):
                for member in follower.members:
                    if member.pending is not None:
                        flush[member.number] = Write(member, ())
        self._stages = [list(flush.values()), writes] if flush else [writes]
        self.race = isinstance(step, Race)
        self.in_line = any(write.branch.sees is not None for write in writes)
        if self.together and len(writes) > self.group.rows_of_part:
            raise InputError(
                f"{len(writes)} branches race or see each other, which generate side by side: the "
                f"engine has rows for {self.group.rows_of_part}, give it more"
            )

    def _check_writes(self, writes: Any) -> None:
        """Raises InputError if a script yields what cannot be written."""
        if not isinstance(writes, list | tuple) or not writes:
            raise InputError(
                f"its layout yields {writes!r}: expected a list of what Branch.write gives"
            )
        for write in writes:
            if not isinstance(write, Write):
                raise InputError(
                    f"its layout yields a list with {write!r}: expected what Branch.write gives"
                )
            _check_write(self, write)
        numbers = [write.branch.number for write in writes]
        if len(set(numbers)) < len(numbers):
            raise InputError(f"its layout writes to branches {numbers} at once: expected each once")
        grown = {write.branch.number: len(write.tokens) + write.most for write in writes}
        for write in writes:
            branch = write.branch
            end = branch.end + sum(grown.get(n, 0) for n in (branch.number, *_seen(branch)))
            if branch.position < 0 or end > self.group.config.max_length:
                raise InputError(
                    f"the write to branch {branch.number} would go from position {branch.position} "
                    f"to {end}, but the model's max_length is {self.group.config.max_length}"
                )


def _seen(branch: Branch) -> list[int]:
    return [other.number for other in branch.sees or ()]


def _check_write(active: Active, write: Write) -> None:
    """Raises InputError if a write cannot be done."""
    branch = write.branch
    what = f"the write to branch {branch.number}"
    if branch.owner is not active:
        raise InputError(f"{what} is to a branch of another request")
    branch.check_alive("write")
    for other in branch.sees or ():
        if other.owner is not active or other is branch:
            raise InputError(f"{what} sees branch {other.number}: expected others of its request")
        other.check_alive(f"branch {branch.number}, which sees others")
    if write.most < 0:
        raise InputError(f"{what} generates {write.most} tokens: expected 0 or more")
    from_pending = branch.pending is not None or (branch.last is not None and active.joins)
    if write.most and not write.tokens and not from_pending:
        raise InputError(f"{what} has no token to go on from: give it some")
    if write.shared and write.most:
        raise InputError(
            f"{what} is shared by the streams and generates {write.most} tokens, which takes all "
            "of them: generate by another write"
        )
    if write.shared and len(set(active.parts)) > 1:
        raise InputError(
            f"{what} is shared by streams that lie on {len(set(active.parts))} devices, each of "
            "which has a cache of its own: give a mesh with stream=1"
        )
    if write.shared or branch.sees is not None or branch.position != branch.reached:
        active.check_forks()
    if write.shared:
        active.group.first()  # raises where the first stream cannot be computed alone
    marks = active.group.config.branches
    if marks and not 0 <= branch.mark <= marks:
        raise InputError(f"{what} is marked {branch.mark}, but the model has branches={marks}")
    check_ids(active.group.config, what, write.tokens)


def _answer(value: Any) -> list[int]:
    """The tokens that a script returns."""
    try:
        return [] if value is None else list(map(operator.index, value))
    except TypeError:
        raise InputError(f"its layout returns {value!r}: expected token ids") from None
