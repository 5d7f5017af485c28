"""How published systems write a text in several branches, as scripts for the generation engine.

Each is called `layout(root, request)`, with an empty branch (`parscale.branches`).
Tags are token ids here; `parscale.layout_text` reads descriptions in which they are text.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from parscale.branches import Branch, Race, join
from sharding.settings import InputError

if TYPE_CHECKING:
    from parscale.engine import Request

Tokens = tuple[int, ...]


def plain(root: Branch, request: "Request") -> Iterator:
    """The prompt, and what follows it."""
    yield [root.write(request.prompt, request.tokens, request.until)]
    return root.new


def shared_prompt(root: Branch, request: "Request") -> Iterator:
    """As `plain`, but the first stream alone reads the prompt, all but its last token.

    The other streams see that stream's keys and values: an approximation, of which the prompt costs
    the time and memory of one stream.
    """
    if len(request.prompt) > 1:
        yield [root.write(request.prompt[:-1], shared=True)]
    yield [root.write(request.prompt[-1:], request.tokens, request.until)]
    return root.new


@dataclasses.dataclass(frozen=True)
class Multiverse:
    """Map, process, reduce, as often and as deep as the model asks for it (arXiv 2506.09991).

    When the model has written `fork`, there are as many paths as it has written `outline` since it
    began or joined others. They are written side by side, not seeing each other, from the same
    position; what follows the conclusion's tag sees all of them, with their keys and values as they
    are, and stands after the longest.

    Attributes:
      fork: ends the map stage.
      outline: is written once for each path in the map stage.
      paths: what the paths begin with, in order; further outlines have none.
      end: ends a path.
      conclusion: what the reduce stage begins with.
      most: tokens of a path at most.
    """

    fork: Tokens
    outline: Tokens
    paths: tuple[Tokens, ...]
    end: Tokens
    conclusion: Tokens
    most: int

    def __call__(self, root: Branch, request: "Request") -> Iterator:
        text, _ = yield from self.text(root, request.prompt, request.tokens, request.until)
        return text

    def text(self, branch: Branch, begin: Tokens, most: int, until: frozenset) -> Iterator:
        """Writes `begin` and a text, with whatever forks are in it.

        Args:
          branch: where.
          begin: given tokens.
          most: tokens of the text, but those of paths.
          until: what ends it.

        Returns:
          the tokens after `begin`, those of paths too, and the branch that has them.
        """
        text: list[int] = []
        while True:
            yield [branch.write(begin, most, until | {self.fork})]
            new, most = branch.new, most - len(branch.new)
            text += new
            if not ends_with(new, self.fork) or most <= 0:
                return text, branch
            begins = self.paths[: occurrences(new, self.outline)]
            if not begins:  # a tag that means nothing here
                begin = ()
                continue
            ended = yield from beside(
                *(
                    self.text(path, begin, self.most, frozenset({self.end}))
                    for path, begin in zip(branch.fork(len(begins)), begins, strict=True)
                )
            )
            whole = [[*begin, *path] for begin, (path, _) in zip(begins, ended, strict=True)]
            branch, begin = self.join(whole, [last for _, last in ended])
            text += [token for path in whole for token in path]
            text += self.conclusion

    def join(self, texts: list[list[int]], paths: list[Branch]) -> tuple[Branch, Tokens]:
        """A branch that sees the paths, and what is to be written on it, given their texts."""
        return join(paths), self.conclusion


@dataclasses.dataclass(frozen=True)
class ThreadWeaver(Multiverse):
    """As `Multiverse`, but paths are joined by their texts (arXiv 2512.07843).

    What follows has read them one after the other: it goes on from the first path, after which the
    others are read again.
    """

    def join(self, texts: list[list[int]], paths: list[Branch]) -> tuple[Branch, Tokens]:
        again = [token for text in texts[1:] for token in text]
        paths[0].chain = max(path.chain for path in paths)  # it has to wait for all of them
        return paths[0], (*again, *self.conclusion)


@dataclasses.dataclass(frozen=True)
class ParaThinker:
    """Thoughts beside each other, then a summary that sees them all (arXiv 2509.04475).

    All thoughts stand at the same positions, and are told apart by their marks where the model has
    some (`ModelConfig.branches`), which must then be one for each thought.

    Attributes:
      thoughts: what the thoughts begin with, in order.
      ends: each ends a thought.
      summary: what the summary begins with.
      most: tokens of a thought at most.
      first_ends: the first thought to end ends the others.
    """

    thoughts: tuple[Tokens, ...]
    ends: tuple[Tokens, ...]
    summary: Tokens
    most: int
    first_ends: bool = False

    def __call__(self, root: Branch, request: "Request") -> Iterator:
        yield [root.write(request.prompt)]
        thoughts = root.fork(len(self.thoughts))
        for mark, thought in enumerate(thoughts, 1):
            thought.mark = mark
        writes = [
            thought.write(begin, self.most, self.ends)
            for thought, begin in zip(thoughts, self.thoughts, strict=True)
        ]
        yield Race(tuple(writes)) if self.first_ends else writes
        whole = join(thoughts)
        yield [whole.write(self.summary, request.tokens, request.until)]
        return whole.new


@dataclasses.dataclass(frozen=True)
class Ape:
    """Contexts that are read apart, then a prompt that sees them all (arXiv 2502.05431).

    They stand at the same positions after what they share. The prompt's attention to all of them
    together is one part, to the rest another; a temperature and a scale of 1 for the contexts' part
    is plain parallel reading.

    Attributes:
      shared: what every context is read after; may be empty.
      contexts: to be read.
      temperature: of scores of contexts.
      scale: of the logarithm of the contexts' weight.
    """

    shared: Tokens
    contexts: tuple[Tokens, ...]
    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self):
        if not self.contexts or not all(self.contexts):
            raise InputError(f"contexts={self.contexts}: expected some, none of them empty")
        for name in ("temperature", "scale"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)}: expected more than 0")

    def __call__(self, root: Branch, request: "Request") -> Iterator:
        if self.shared:
            yield [root.write(self.shared)]
        views = root.fork(len(self.contexts))
        yield [view.write(text) for view, text in zip(views, self.contexts, strict=True)]
        if (self.temperature, self.scale) != (1, 1):
            for view in views:
                view.part(1, self.temperature, self.scale * self.temperature)
        whole = join(views)
        yield [whole.write(request.prompt, request.tokens, request.until)]
        return whole.new


@dataclasses.dataclass(frozen=True)
class Hogwild:
    """Workers that read each other's texts while they write them (arXiv 2504.06261).

    Attributes:
      workers: what each worker's text begins with; in the other arrangements than contiguous, what
        each of its steps begins with.
      arrangement: contiguous (a worker sees the prompt, the others' texts, its own), interleaved
        (the prompt and all finished steps in the order of their ends, then its own step), combined
        (those, then the others' unfinished steps, then its own).
      step: ends a step.
      others, own: what stands before the others' unfinished steps and a worker's own, if combined.
    """

    workers: tuple[Tokens, ...]
    arrangement: str = "contiguous"
    step: Tokens = ()
    others: Tokens = ()
    own: Tokens = ()

    def __post_init__(self):
        names = ("contiguous", "interleaved", "combined")
        if self.arrangement not in names:
            raise InputError(f"arrangement={self.arrangement}: expected one of {', '.join(names)}")
        if not self.workers or not all(self.workers):
            raise InputError(f"workers={self.workers}: expected some, none of them empty")
        if self.arrangement != "contiguous" and not self.step:
            raise InputError(f"arrangement={self.arrangement}: a step needs an end, give step")

    def __call__(self, common: Branch, request: "Request") -> Iterator:
        workers = common.fork(len(self.workers))
        others, own = common.fork(2)
        yield [common.write(request.prompt)]
        if self.arrangement == "combined":
            for header, text in ((others, self.others), (own, self.own)):
                header.sees = [common]
                if text:
                    yield [header.write(text)]
        for worker in workers:
            rest = [other for other in workers if other is not worker]
            worker.sees = {
                "contiguous": [common, *rest],
                "interleaved": [common],
                "combined": [common, others, *rest, own],
            }[self.arrangement]
        if self.arrangement == "contiguous":
            yield [
                worker.write(begin, request.tokens, request.until)
                for worker, begin in zip(workers, self.workers, strict=True)
            ]
            pairs = zip(self.workers, workers, strict=True)
            return [token for begin, worker in pairs for token in (*begin, *worker.new)]
        texts = yield from self._steps(common, workers, request)
        return [token for text in texts for token in text]

    def _steps(self, common: Branch, workers: list[Branch], request: "Request") -> Iterator:
        """Lets workers write steps, and puts each that is finished behind what all see.

        Returns:
          the tokens of each worker, with what its steps begin with.
        """
        begins: dict[int, Tokens] = dict(enumerate(self.workers))
        texts: list[list[int]] = [[] for _ in workers]
        left = dict.fromkeys(begins, request.tokens)
        while left:
            writes = []
            for number in left:
                begin = begins.pop(number, ())
                texts[number] += begin
                until = request.until | {self.step}
                writes.append(workers[number].write(begin, left[number], until))
            yield Race(tuple(writes))
            for number in list(left):
                worker = workers[number]
                texts[number] += worker.new
                left[number] -= len(worker.new)
                over = not left[number] or any(ends_with(worker.run, end) for end in request.until)
                if over or ends_with(worker.run, self.step):
                    yield [worker.write()]
                    common.take(worker)
                    begins[number] = self.workers[number]
                if over:
                    del left[number]
        return texts


def beside(*scripts: Iterator) -> Iterator:
    """Runs parts of a script side by side; gives what each returns."""
    results: list = [None] * len(scripts)
    steps = {}

    def go_on(number: int) -> None:
        try:
            steps[number] = next(scripts[number])
        except StopIteration as stop:
            steps.pop(number, None)
            results[number] = stop.value

    for number in range(len(scripts)):
        go_on(number)
    while steps:
        yield [write for step in steps.values() for write in step]
        for number in list(steps):
            go_on(number)
    return results


def ends_with(tokens: list[int], end: Tokens) -> bool:
    """Whether `end`, which has tokens, is at the end of others."""
    return bool(end) and tuple(tokens[-len(end) :]) == tuple(end)


def occurrences(tokens: list[int], part: Tokens) -> int:
    """How often a run of tokens occurs in others."""
    places = range(len(tokens) - len(part) + 1)
    return sum(tuple(tokens[place : place + len(part)]) == tuple(part) for place in places)
