"""Text that forks and joins: from a short description, what a model of one row of tokens reads.

A description is a list of segments. A segment goes on from another, begins a branch beside others
that go on from the same one, or joins several. A token sees what comes before it in its own segment
and all of the segments that its own comes after, directly or not. Published forms differ in three
rules: the position at which a branch starts, that at which a join goes on, and whether a join sees
its branches as they were written, apart, or reads their texts again in a line.

Multiverse (arXiv 2506.09991) and ParaThinker (2509.04475) are `Rules()`; ThreadWeaver (2512.07843)
is `Rules(sees="text")`, or `trie` of its units; a plain sequence is one segment.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from pallas_kernels.masks import Mask
from sharding.settings import InputError, check_choices, option

NO_TOKEN = -1


@dataclasses.dataclass(frozen=True)
class Segment:
    """A run of tokens.

    Attributes:
      tokens: their ids.
      after: the segments that it comes after, by number in the description: none at a beginning,
        one to go on from it or to branch off, several to join them.
    """

    tokens: tuple[int, ...]
    after: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rules:
    """Where branches and joins stand, and what a join sees."""

    branch: str = option(
        "shared",
        "position at which a segment after one other starts: shared (after that one's last), depth "
        "(the number of tokens that it sees), flat (its place in the row)",
        choices=("shared", "depth", "flat"),
    )
    join: str = option(
        "max",
        "position at which a join starts: max (after the last position of any branch), "
        "concatenated (the number of tokens that it sees)",
        choices=("max", "concatenated"),
    )
    sees: str = option(
        "cache",
        "what a join sees of its branches: cache (their keys and values, written apart), text "
        "(their tokens once more, one branch after the other)",
        choices=("cache", "text"),
    )

    def __post_init__(self):
        check_choices(self)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A row of tokens that says of each where it stands and who sees it.

    Attributes:
      ids: int32 `[T]`, tokens of the segments in the order of the description.
      positions: int32 `[T]`, from 0.
      segments: int32 `[T]`, the number of each token's segment in `description`.
      before: int32 `[T]`, the place of the token that a token follows: the last of its segment or
        of the first one that it comes after; NO_TOKEN at a beginning. Its output predicts the
        token.
      runs: int32 `[R, 2, T]`, the places of the queries that see each token, as `masks.Mask` has
        them, up to the causal order.
      description: the segments, with those that were added where a join reads texts again.
    """

    ids: Int[np.ndarray, "T"]
    positions: Int[np.ndarray, "T"]
    segments: Int[np.ndarray, "T"]
    before: Int[np.ndarray, "T"]
    runs: Int[np.ndarray, "R 2 T"]
    description: tuple[Segment, ...]

    @property
    def mask(self) -> Mask:
        """Who sees whom, for attention."""
        return Mask(self.runs, causal=True, queries=len(self.ids))

    @property
    def longest_chain(self) -> int:
        """Tokens that have to be written one after the other; the others are written meanwhile."""
        longest: list[int] = []
        for segment in self.description:
            earlier = max((longest[other] for other in segment.after), default=0)
            longest.append(earlier + len(segment.tokens))
        return max(longest, default=0)


def lay_out(segments: Sequence[Segment], rules: Rules = Rules()) -> Layout:
    """The row of a description.

    Args:
      segments: each after those that it comes after.
      rules: where branches and joins stand, and what a join sees.

    Raises:
      InputError: a segment comes after one that is not before it, or after one twice; or there is
        no token at all.
    """
    check_description(segments)
    if rules.sees == "text":
        segments = read_again(segments)
    lengths = np.array([len(segment.tokens) for segment in segments])
    if not lengths.sum():
        raise InputError("a description without a token: give at least one segment that has some")
    places = np.cumsum(lengths) - lengths
    seen = ancestors(segments)
    starts: list[int] = []
    for number, segment in enumerate(segments):
        ends = [starts[other] + lengths[other] for other in segment.after]
        depth = sum(lengths[other] for other in seen[number])
        if len(segment.after) > 1:
            starts.append(max(ends) if rules.join == "max" else depth)
        else:
            shared = ends[0] if ends else 0
            starts.append({"shared": shared, "depth": depth, "flat": places[number]}[rules.branch])
    return Layout(
        ids=_row([segment.tokens for segment in segments]),
        positions=_row([s + np.arange(n) for s, n in zip(starts, lengths, strict=True)]),
        segments=_row([np.full(n, i) for i, n in enumerate(lengths)]),
        before=_before(segments, places, lengths),
        runs=_runs(seen, places, lengths),
        description=tuple(segments),
    )


def check_description(segments: Sequence[Segment]) -> None:
    """Raises InputError, naming the segment, if one comes after what is not there before it."""
    for number, segment in enumerate(segments):
        what = "joins" if len(segment.after) > 1 else "comes after"
        for other in segment.after:
            if not 0 <= other < number:
                raise InputError(
                    f"segment {number} {what} {other}: expected a number from 0 to {number - 1}, "
                    "a segment before it"
                )
        if len(set(segment.after)) < len(segment.after):
            raise InputError(
                f"segment {number} joins {', '.join(map(str, segment.after))}: expected each once"
            )


def ancestors(segments: Sequence[Segment]) -> list[set[int]]:
    """For each segment the numbers of those that it comes after, directly or not."""
    seen: list[set[int]] = []
    for segment in segments:
        seen.append(set(segment.after).union(*(seen[other] for other in segment.after)))
    return seen


def read_again(segments: Sequence[Segment]) -> list[Segment]:
    """The same description without joins: what a join follows stands in one line before it.

    The line goes on from its first branch as it is; of the others it has copies, which see the
    branches before them.
    """
    seen = ancestors(segments)
    line: list[Segment] = []
    end: list[int] = []  # for each segment of `segments`, the one of `line` that is its own
    for segment in segments:
        last = tuple(end[other] for other in segment.after[:1])
        if len(segment.after) > 1:
            first, *others = segment.after
            have = seen[first] | {first}
            for other in others:
                for copied in sorted((seen[other] | {other}) - have):
                    line.append(Segment(segments[copied].tokens, last))
                    last = (len(line) - 1,)
                have |= seen[other] | {other}
        line.append(Segment(segment.tokens, last))
        end.append(len(line) - 1)
    return line


def trie(units: Sequence[Sequence[int]]) -> list[Segment]:
    """Sequences of tokens as one tree, in which what they begin with in common stands once.

    Args:
      units: of at least one token each. Depth first in their order, children by the first unit
        that has them.

    Raises:
      InputError: an empty unit.
    """
    children: dict = {}
    for number, unit in enumerate(units):
        if not len(unit):
            raise InputError(f"unit {number} is empty: give at least one token")
        node = children
        for token in unit:
            node = node.setdefault(int(token), {})
    segments: list[Segment] = []
    open_ = [((), first, node) for first, node in reversed(children.items())]
    while open_:
        after, token, node = open_.pop()
        tokens = [token]
        while len(node) == 1:
            ((token, node),) = node.items()
            tokens.append(token)
        segments.append(Segment(tuple(tokens), after))
        own = (len(segments) - 1,)
        open_ += [(own, first, child) for first, child in reversed(node.items())]
    return segments


def _row(parts: Sequence[Sequence[int]]) -> Int[np.ndarray, "T"]:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _before(segments, places, lengths) -> Int[np.ndarray, "T"]:
    last: list[int] = []  # place of the last token up to each segment, on the way to its beginning
    first_before = []
    for segment, place, length in zip(segments, places, lengths, strict=True):
        earlier = last[segment.after[0]] if segment.after else NO_TOKEN
        first_before.append(earlier)
        last.append(int(place + length) - 1 if length else earlier)
    rows = [
        [earlier, *range(place, place + length - 1)][:length]
        for earlier, place, length in zip(first_before, places, lengths, strict=True)
    ]
    return _row(rows)


def _runs(seen, places, lengths) -> Int[np.ndarray, "R 2 T"]:
    """Segments that stand side by side and see a segment make one run of queries."""
    of_segment: list[list[list[int]]] = []
    for number in range(len(places)):
        runs: list[list[int]] = []
        for other in range(number, len(places)):
            if (other == number or number in seen[other]) and lengths[other]:
                start, end = int(places[other]), int(places[other] + lengths[other])
                if runs and runs[-1][1] == start:
                    runs[-1][1] = end
                else:
                    runs.append([start, end])
        of_segment.append(runs)
    most = max(map(len, of_segment))
    table = np.array([runs + [[0, 0]] * (most - len(runs)) for runs in of_segment], np.int32)
    return np.repeat(table, lengths, 0).transpose(1, 2, 0)
