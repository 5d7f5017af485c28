"""What a script writes with: branches of a text over shared blocks of a cache.

A script is a generator function `script(root, request)`. It yields lists of writes, which run side
by side, and goes on when all of them have ended; what it returns are the tokens of the answer.

    def script(root, request):
        yield [root.write(request.prompt)]
        paths = root.fork(2)
        yield [path.write([tag], most=20, until={end}) for path in paths]
        whole = join(paths)
        yield [whole.write([conclusion], most=20)]
        return whole.new
"""

import dataclasses
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from parscale.block_memory import BlockMemory
from sharding.settings import InputError


@dataclasses.dataclass
class Entry:
    """A block of each stream in a view.

    Attributes:
      blocks: numbers, one for each stream; streams that share what they read name the same.
      count: slots that are seen.
      shift: positions that it is moved by.
      part: of the view that it belongs to (`models.block_cache.Parts`).
    """

    blocks: tuple[int, ...]
    count: int
    shift: int = 0
    part: int = 0


class Token(NamedTuple):
    """A token, where it stands, and the mark of its branch."""

    id: int
    position: int
    mark: int


@dataclasses.dataclass(frozen=True)
class Write:
    """Tokens to write at the end of a branch, then others to generate.

    Attributes:
      branch: where.
      tokens: what is written first.
      most: how many are generated at most.
      until: runs of tokens, each of which ends the generation and is the last that is generated.
      shared: of several streams only the first computes; the others read its keys and values.
        Such a write generates nothing.
    """

    branch: "Branch"
    tokens: tuple[int, ...]
    most: int = 0
    until: frozenset[tuple[int, ...]] = frozenset()
    shared: bool = False


@dataclasses.dataclass(frozen=True)
class Race:
    """Writes of which the first to end stops the others where they are.

    First all tokens are written; then every branch generates one token after the other, side by
    side with the others, so that all have generated as many when one of them ends.
    """

    writes: tuple[Write, ...]


class Branch:
    """A text that is being written, and what its tokens see.

    Attributes:
      number: of the branch in its request, from 0.
      position: of the next token; may be set before a write.
      mark: what `ModelConfig.branches` calls this branch, up to that number; 0: none. A model that
        has none of them takes any.
      new: tokens that its last write generated; one without tokens to write or generate, which
        puts the last generated token into the cache, leaves them.
      run: tokens that it has generated since it was last given some.
      chain: tokens generated one after the other so far, on the longest way to here.
      entries: what it has written and what it goes on from, in order.
      sees: other branches of the request whose texts it reads as they grow, in a line before its
        own text, each moved to follow the one before; None: none, and nothing moves. Branches of
        one step that see each other are written in their order, and generate side by side, each
        seeing the others' tokens of the same time. The last token that a branch has generated is
        seen when it is in the cache: as it goes on, or by a write of nothing.
      temperatures, factors: of the parts of its view, from part 0 (`models.block_cache.Parts`).
    """

    def __init__(self, owner: Any, number: int):
        self.owner, self.number = owner, number
        self.position = self.mark = self.chain = 0
        self.new: list[int] = []
        self.run: list[int] = []
        self.entries: list[Entry] = []
        self.sees: Sequence[Branch] | None = None
        self.temperatures: tuple[float, ...] = (1.0,)
        self.factors: tuple[float, ...] = (1.0,)
        self.last: Token | None = None  # what it goes on from
        self.cached = True  # whether that one is in the cache; if not, it was generated
        self.members: list[Branch] = []  # what it forks from or joins, until they are in the cache
        self.followers: list[Branch] = []  # those of which it is a member
        self.reached = 0  # the position after its last token, where the next one is by itself
        self.states: Any = None  # what layers without blocks remember
        self.inherited = 0  # entries that it began with
        self.spare: list[tuple[int, ...]] = []  # blocks of its own without a token yet
        self.shared = False  # whether streams share what is written now
        self.dropped = False
        self.grows = False  # whether the last entry is its own, to be filled further

    def write(
        self,
        tokens: Iterable[int] = (),
        most: int = 0,
        until: Iterable[int | Sequence[int]] = (),
        *,
        shared: bool = False,
    ) -> Write:
        """What is to be written and generated at the end of this branch; to be yielded.

        Args:
          tokens: what is written first.
          most: how many are generated at most.
          until: tokens, or runs of them, each of which ends the generation.
          shared: as in `Write`.
        """
        ends = (tuple(end) if isinstance(end, Sequence) else (int(end),) for end in until)
        tokens = tuple(map(operator.index, tokens))
        return Write(self, tokens, most, frozenset(filter(None, ends)), shared)

    def fork(self, count: int = 1) -> "list[Branch]":
        """Branches that go on from here, and see nothing of each other; nothing is copied.

        Raises:
          InputError: `count` is less than 1, or the branch was dropped.
        """
        self.check_alive("fork")
        if count < 1:
            raise InputError(f"a fork into {count} branches: expected at least 1")
        return [self._child() for _ in range(count)]

    def drop(self) -> None:
        """Releases its blocks, but those that others hold or will see."""
        self.dropped = True
        self._leave_members()
        self._release_if_unwanted()

    def _leave_members(self) -> None:
        for member in self.members:
            member.followers.remove(self)
            member._release_if_unwanted()
        self.members = []

    def _release_if_unwanted(self) -> None:
        if self.dropped and not self.followers:
            for entry in self.entries:
                self.memory.release(entry.blocks)
            self.entries, self.states = [], None
            self._release_spare()

    @property
    def memory(self) -> BlockMemory:
        return self.owner.memory

    @property
    def pending(self) -> Token | None:
        """Its last token, if that is not in the cache."""
        return None if self.cached else self.last

    @property
    def length(self) -> int:
        """Tokens in its entries."""
        return sum(entry.count for entry in self.entries)

    def move(self, by: int) -> None:
        """Moves what it sees by so many positions.

        Raises:
          InputError: the branch was dropped, or another has yet to read it (`check_unread`).
        """
        self.check_unread("move")
        self.owner.check_forks()
        for entry in self.entries:
            entry.shift += by
        self._end_text()

    def _end_text(self) -> None:
        """What is written next is in blocks of its own, and does not go on from its last token."""
        self.grows = False
        if self.cached:
            self.last = None

    def part(self, number: int, temperature: float = 1.0, factor: float = 1.0) -> None:
        """Makes what it wrote itself so far a part of the view, as APE does with contexts.

        Raises:
          InputError: part 0, which is everything else; a temperature or factor of 0 or less; the
            branch was dropped, or another has yet to read it (`check_unread`).
        """
        self.check_unread("part")
        self.owner.check_forks()
        if number < 1:
            raise InputError(f"part {number} of a view: expected 1 or more, 0 is all the rest")
        for name, value in (("temperature", temperature), ("factor", factor)):
            if not value > 0:
                raise InputError(f"{name}={value} of part {number}: expected more than 0")
        for entry in self.entries[self.inherited :]:
            entry.part = number
        for name, value in (("temperatures", temperature), ("factors", factor)):
            have = list(getattr(self, name))
            have += [1.0] * (number + 1 - len(have))
            have[number] = value
            setattr(self, name, tuple(have))
        self._end_text()

    def take(self, other: "Branch") -> None:
        """Puts the text of another branch behind its own, moved to follow it; the other is empty.

        Both have to count their positions from 0, as branches with `sees` do.

        Raises:
          InputError: the last token of one of them is not in the cache: write nothing to it first;
            one was dropped, or another branch has yet to read it (`check_unread`).
        """
        for branch in (self, other):
            branch.check_unread("take")
            if branch.pending is not None:
                raise InputError(
                    f"take of branch {branch.number}, whose last token is not in the cache yet: "
                    "yield [branch.write()] before"
                )
        self.owner.check_forks()
        length = self.length
        for entry in other.entries:
            entry.shift += length
        self.entries += other.entries
        self.position += other.position
        self.reached = self.position
        other.entries, other.position, other.reached, other.inherited = [], 0, 0, 0
        self._end_text()
        other._end_text()

    def set_shared(self, shared: bool) -> None:
        """Whether streams share what is written next, which is then in blocks of its own."""
        if shared != self.shared:
            self._release_spare()
            self.shared, self.grows = shared, False

    def _release_spare(self) -> None:
        for blocks in self.spare:
            self.memory.release(blocks)
        self.spare = []

    def _child(self) -> "Branch":
        child = self.owner.new_branch()
        for name in (
            "position", "reached", "mark", "chain", "last", "cached", "sees", "states",
            "temperatures", "factors",
        ):  # fmt: skip
            setattr(child, name, getattr(self, name))
        # Its last token has to be in the cache once, for a join of the forks sees it once. Where
        # there are no joins, every fork may write it for itself.
        if self.owner.joins and (self.members or self.pending):
            child.follow(self.members or [self])
            child.cached = True
        else:
            child.see(self.entries)
            child.inherited = len(child.entries)
        return child

    def follow(self, members: "Sequence[Branch]") -> None:
        """Makes branches those whose entries it will see as they are now."""
        for member in members:
            if member not in self.members:
                self.members.append(member)
                member.followers.append(self)

    def see(self, entries: Sequence[Entry]) -> None:
        """Adds entries to its view, with what they hold now."""
        for entry in entries:
            if entry.count:
                self.memory.hold(entry.blocks)
                self.entries.append(dataclasses.replace(entry))
        self.grows = False

    @property
    def end(self) -> int:
        """The position after all that it has, or sees in a line."""
        if self.sees is None:
            return self.position
        return sum(b.length + (b.pending is not None) for b in (*self.sees, self))

    def check_alive(self, what: str) -> None:
        """Raises InputError if the branch is no more; `what` is what was wanted of it."""
        if self.dropped:
            raise InputError(f"{what} of branch {self.number}, which was dropped or has ended")

    def check_unread(self, what: str) -> None:
        """Raises InputError if the branch is no more, or a join or fork of it has no token yet.

        Those see what it has when they are first written to, which is not to change before.
        """
        self.check_alive(what)
        if self.followers:
            raise InputError(
                f"{what} of branch {self.number}, from which branch {self.followers[0].number} "
                "goes on: write to that one first"
            )


def join(branches: Sequence[Branch], position: int | None = None) -> Branch:
    """A branch that sees all that the given ones see, with their keys and values as they are.

    Args:
      branches: of one request; what they have in common is seen once.
      position: of its first token; by default that after the furthest branch.

    Raises:
      InputError: no branch, one that was dropped, one named twice, or branches of several requests.
    """
    if not branches:
        raise InputError("a join of no branch: expected at least one")
    for branch in branches:
        branch.check_alive("join")
    first = branches[0]
    if any(branch.owner is not first.owner for branch in branches):
        raise InputError("a join of branches of several requests: expected those of one")
    if len({branch.number for branch in branches}) < len(branches):
        numbers = ", ".join(str(branch.number) for branch in branches)
        raise InputError(f"a join of branches {numbers}: expected each once")
    first.owner.check_forks()
    whole = first.owner.new_branch()
    for branch in branches:
        whole.follow(branch.members or [branch])
    whole.temperatures, whole.factors = _join_parts(whole.members)
    whole.chain = max(branch.chain for branch in branches)
    whole.position = max(branch.end for branch in branches) if position is None else position
    whole.reached = whole.position
    return whole


def _join_parts(branches: Sequence[Branch]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The temperatures and factors of the parts of several branches."""
    values = {}
    for branch in branches:
        for number in {entry.part for entry in branch.entries}:
            value = branch.temperatures[number], branch.factors[number]
            if values.setdefault(number, value) != value:
                raise InputError(
                    f"a join of branches whose part {number} has temperatures and factors "
                    f"{values[number]} and {value}: expected the same"
                )
    every = [values.get(number, (1.0, 1.0)) for number in range(max(values, default=0) + 1)]
    return tuple(zip(*every, strict=True))


def gather(branch: Branch) -> None:
    """Gives a branch what its members see; their last tokens are in the cache now."""
    if not branch.members:
        return
    seen: dict[tuple, Entry] = {}
    for member in branch.members:
        for entry in member.entries:
            name = (entry.blocks, entry.shift)
            if name not in seen or seen[name].count < entry.count:
                seen[name] = entry
    branch.see(list(seen.values()))
    branch.inherited = len(branch.entries)
    branch._leave_members()
