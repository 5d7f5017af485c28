"""Sums of several lists, written one after the other, or beside each other and then joined.

The task on which a fork and a join are told from a plain text (Multiverse, arXiv 2506.09991): each
list is added up in a text of its own, which needs nothing of the others; a conclusion needs them
all. The text of two lists of two digits is, with `a1` for the first item of list a and a capital
for a tag:

    a1 7 a2 5 b1 1 b2 3    Pa a1 7 7 a2 5 2 Sa 2 E    Pb b1 1 1 b2 3 4 Sb 4 E    C Sa 2 2 Sb 4 6 E
    prompt                 path of list a             path of list b             conclusion

A path writes each item of its list, its digit and the sum so far, modulo the base, and the sum once
more; the conclusion writes each list's sum and the total so far, the last of which is the answer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from models.segments import Rules, Segment, lay_out
from models.transformer import LanguageModel
from parscale.branches import Branch, join
from parscale.engine import Engine, Request
from parscale.packing import Batch
from parscale.tasks import to_batch
from sharding.settings import check_at_least, option

FORMS = ("sequential", "fork")
PUBLISHED = Rules()
"""Positions as Multiverse has them."""

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sums:
    """The shape of the task.

    Token ids are the digits, from 0, and then the tags.
    """

    lists: int = option(4, "lists in a prompt, as many as paths")
    digits: int = option(5, "digits in a list")
    base: int = option(5, "sums are modulo this; digits are below it")

    def __post_init__(self):
        check_at_least(self, 2, "lists", "base")
        check_at_least(self, 1, "digits")

    @property
    def conclusion(self) -> int:
        """Begins the conclusion."""
        return self.base

    @property
    def end(self) -> int:
        """Ends a path and the conclusion."""
        return self.base + 1

    def path_tag(self, number: int) -> int:
        """Begins the path of a list."""
        return self.base + 2 + number

    def sum_tag(self, number: int) -> int:
        """Stands before the sum of a list."""
        return self.path_tag(self.lists) + number

    def items(self, number: int) -> range:
        """Stand before the digits of a list."""
        first = self.sum_tag(self.lists) + number * self.digits
        return range(first, first + self.digits)

    @property
    def vocab_size(self) -> int:
        """Digits, tags and items [V]."""
        return self.items(self.lists).start

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt."""
        return 2 * self.lists * self.digits

    @property
    def path_length(self) -> int:
        """Tokens of a path, both tags among them."""
        return 3 * self.digits + 4

    @property
    def conclusion_length(self) -> int:
        """Tokens of the conclusion, both tags among them."""
        return 3 * self.lists + 2

    @property
    def length(self) -> int:
        """Tokens of a whole text, rounded up to a multiple of 8 [T]."""
        text = self.prompt_length + self.lists * self.path_length + self.conclusion_length
        return -(-text // 8) * 8


def draw(task: Sums, rows: int, random: np.random.Generator) -> Int[np.ndarray, "rows lists n"]:
    """The digits of every list."""
    return random.integers(task.base, size=(rows, task.lists, task.digits))


def texts(task: Sums, lists: Int[np.ndarray, "lists n"]) -> tuple[Tokens, list[Tokens], Tokens]:
    """The prompt, the paths and the conclusion."""
    so_far = np.cumsum(lists, 1) % task.base
    sums = so_far[:, -1]
    totals = np.cumsum(sums) % task.base
    prompt, paths, conclusion = [], [], [task.conclusion]
    for number, digits in enumerate(lists):
        items = task.items(number)
        prompt += np.stack([items, digits], 1).ravel().tolist()
        steps = np.stack([items, digits, so_far[number]], 1).ravel()
        named = (task.sum_tag(number), sums[number])
        paths.append(_tokens(task.path_tag(number), *steps, *named, task.end))
        conclusion += [*named, totals[number]]
    return _tokens(*prompt), paths, _tokens(*conclusion, task.end)


def _tokens(*ids: int) -> Tokens:
    return tuple(map(int, ids))


def answer(task: Sums, lists: Int[np.ndarray, "lists n"]) -> int:
    """What the conclusion should end with."""
    return int(lists.sum() % task.base)


def segments(task: Sums, lists: Int[np.ndarray, "lists n"], form: str) -> list[Segment]:
    """The whole text as one segment, or as a prompt, paths beside each other, and their join."""
    return arrange(*texts(task, lists), form)


def arrange(prompt: Tokens, paths: Sequence[Tokens], conclusion: Tokens, form: str):
    """The segments of a text that is in parts."""
    if form == "sequential":
        return [Segment((*prompt, *(token for path in paths for token in path), *conclusion))]
    beside = [Segment(path, (0,)) for path in paths]
    return [Segment(prompt), *beside, Segment(conclusion, tuple(range(1, len(paths) + 1)))]


def to_rows(
    task: Sums, lists: Int[np.ndarray, "rows lists n"], form: str, rules: Rules = PUBLISHED
) -> Batch:
    """Texts as training reads them; `mask` is 1 where a model has to write the next token itself.

    That is all but the prompt and the tags that begin paths and the conclusion.
    """
    laid_out = [lay_out(segments(task, digits, form), rules) for digits in lists]
    given = [task.conclusion, *map(task.path_tag, range(task.lists))]
    asked = [
        (np.arange(len(layout.ids)) >= task.prompt_length) & ~np.isin(layout.ids, given)
        for layout in laid_out
    ]
    return to_batch(laid_out, asked, task.length)


@dataclasses.dataclass(frozen=True)
class Script:
    """Writes a text (`parscale.branches`): the tags that begin its parts, after each what follows.

    Attributes:
      task: the shape of the task.
      form: one of FORMS.
      rules: of positions, for forks: as `models.segments.lay_out` gives them to paths of the right
        length. What a join sees is always the cache.
    """

    task: Sums
    form: str
    rules: Rules = PUBLISHED

    def __call__(self, root: Branch, request: Request) -> Iterator:
        task, most = self.task, self.task.path_length - 1
        numbers = range(task.lists)
        if self.form == "sequential":
            tokens = [*request.prompt]
            for number in numbers:
                yield [root.write([*tokens, task.path_tag(number)], most, {task.end})]
                tokens = []
            yield [root.write([task.conclusion], task.conclusion_length - 1, {task.end})]
            return root.new
        yield [root.write(request.prompt)]
        paths = root.fork(task.lists)
        if self.rules.branch == "flat":
            for number, path in enumerate(paths):
                path.position += number * task.path_length
        yield [
            path.write([task.path_tag(number)], most, {task.end})
            for number, path in enumerate(paths)
        ]
        seen = task.prompt_length + task.lists * task.path_length
        whole = join(paths, None if self.rules.join == "max" else seen)
        yield [whole.write([task.conclusion], task.conclusion_length - 1, {task.end})]
        return whole.new


class Score(NamedTuple):
    """How a model does when it writes everything but the tags that begin parts.

    Attributes:
      accuracy: share of the texts that end with the right total.
      generated: tokens that it writes for a text, on average.
      longest: of them on the longest chain, which it has to write one after the other.
    """

    accuracy: float
    generated: float
    longest: float


def evaluate(
    model: LanguageModel,
    task: Sums,
    lists: Int[np.ndarray, "rows lists n"],
    form: str,
    rules: Rules = PUBLISHED,
) -> Score:
    """Lets a model write the texts of some prompts, and counts the right answers.

    Args:
      model: one that has learned the task.
      task: its shape.
      lists: the prompts' digits.
      form: how the texts are written.
      rules: of positions.
    """
    engine = Engine(model, cache_tokens=64 * task.lists * task.length, rows=64)
    script = Script(task, form, rules)
    most = task.path_length + task.conclusion_length
    numbers = [
        engine.submit(Request(texts(task, digits)[0], most, layout=script)) for digits in lists
    ]
    results = engine.run()
    right, ledgers = 0, []
    for number, digits in zip(numbers, lists, strict=True):
        result = results[number]
        if result.error is not None:
            raise result.error
        right += result.tokens[-2:] == [answer(task, digits), task.end]
        ledgers.append(result.ledger)
    count = len(numbers)
    generated = sum(ledger.generated for ledger in ledgers) / count
    return Score(right / count, generated, sum(ledger.longest for ledger in ledgers) / count)
