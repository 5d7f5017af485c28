"""A value looked up by its key in several documents, which are read in a row or each alone.

A text begins with a tag; then come documents, each a tag and pairs of a key and a value, all keys
of a text different; then a tag and questions, keys of which each is to be answered with its value.
A model learns from documents in a row. Read apart, behind the first tag and at the same positions,
they cost fewer pairs of query and key, and none has seen another: plain parallel reading, to which
APE (arXiv 2502.05431) adds a temperature and a scale of the attention to documents.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from models.segments import Layout, Segment, lay_out
from models.transformer import LanguageModel
from parscale import layouts
from parscale.engine import Engine, Request
from parscale.packing import Batch
from sharding.settings import InputError, check_at_least, option

READINGS = ("sequential", "parallel", "ape")
GRID = tuple((t, s) for t in (0.5, 0.7, 0.9, 1.0) for s in (0.8, 0.9, 1.0))
"""Temperatures and scales that are tried."""


@dataclasses.dataclass(frozen=True)
class Lookup:
    """The shape of the task.

    Token ids are the keys, from 0, the values, and then three tags: of the beginning of a text, of
    a document, of the questions. In a text of training every key is asked `repeats` times.
    """

    documents: int = option(8, "most documents in a text, a power of 2")
    pairs: int = option(4, "pairs of a key and a value in a document, a power of 2")
    keys: int = option(64, "keys in the vocabulary")
    values: int = option(32, "values in the vocabulary")
    repeats: int = option(3, "times that a text of training asks for every key")

    def __post_init__(self):
        check_at_least(self, 1, "documents", "pairs", "repeats")
        check_at_least(self, 2, "values")
        for name in ("documents", "pairs"):
            value = getattr(self, name)
            if value & (value - 1):
                raise InputError(f"{name}={value}: expected a power of 2")
        if self.keys < self.documents * self.pairs:
            raise InputError(
                f"keys={self.keys}: expected at least {self.documents * self.pairs}, a different "
                f"one for each of the {self.pairs} pairs of {self.documents} documents"
            )

    @property
    def begin(self) -> int:
        """Begins a text."""
        return self.keys + self.values

    @property
    def document(self) -> int:
        """Begins a document."""
        return self.begin + 1

    @property
    def questions(self) -> int:
        """Begins the questions."""
        return self.begin + 2

    @property
    def vocab_size(self) -> int:
        """Keys, values and tags [V]."""
        return self.begin + 3

    @property
    def length(self) -> int:
        """Tokens of the longest text of training, rounded up to a multiple of 8 [T]."""
        return -(-self.text_length(self.documents, self.pairs) // 8) * 8

    def text_length(self, documents: int, pairs: int) -> int:
        """Tokens of a text of training with so many documents of so many pairs."""
        return 2 + documents * (1 + 2 * pairs) + 2 * self.repeats * documents * pairs


class Text(NamedTuple):
    """Documents and what is asked of them.

    Attributes:
      documents: tokens of each, its tag among them.
      asked: all keys, `repeats` times, each time in another order.
      answers: their values.
    """

    documents: Int[np.ndarray, "n tokens"]
    asked: Int[np.ndarray, "questions"]
    answers: Int[np.ndarray, "questions"]


def draw(task: Lookup, documents: int, pairs: int, random: np.random.Generator) -> Text:
    """A text of some documents of so many pairs each."""
    count = documents * pairs
    keys = random.permutation(task.keys)[:count]
    values = task.keys + random.integers(task.values, size=count)
    shown = np.stack([keys, values], -1).reshape(documents, 2 * pairs)
    order = np.concatenate([random.permutation(count) for _ in range(task.repeats)])
    tag = np.full((documents, 1), task.document)
    return Text(np.concatenate([tag, shown], 1), keys[order], values[order])


def draw_rows(task: Lookup, keys: int, rows: int, random: np.random.Generator) -> Batch:
    """Texts of so many keys with documents in a row, as many texts as fill each row.

    Documents are of `pairs` pairs, or there is a single one of fewer. `mask` is 1 at the keys that
    are asked.
    """
    documents, pairs = max(keys // task.pairs, 1), min(keys, task.pairs)
    size = task.text_length(documents, pairs)
    many = task.length // size
    batch = {
        name: np.zeros((rows, task.length), np.int32)
        for name in ("ids", "targets", "segment_ids", "positions")
    }
    batch["mask"] = np.zeros((rows, task.length), np.float32)
    for row in range(rows):
        ids = []
        for _ in range(many):
            text = draw(task, documents, pairs, random)
            questions = np.stack([text.asked, text.answers], -1).ravel()
            ids += [task.begin, *text.documents.ravel(), task.questions, *questions]
        batch["ids"][row, : len(ids)] = ids
    batch["targets"][:, :-1] = batch["ids"][:, 1:]
    place = np.arange(many * size)
    batch["segment_ids"][:, : many * size] = 1 + place // size
    batch["positions"][:, : many * size] = place % size
    asked = place % size - (size - 2 * task.repeats * keys)
    batch["mask"][:, : many * size] = (asked >= 0) & (asked % 2 == 0)
    return batch


def read(task: Lookup, text: Text, reading: str) -> Layout:
    """The tokens before the answer to the first question, in the order of a reading."""
    question = (task.questions, int(text.asked[0]))
    documents = [tuple(map(int, document)) for document in text.documents]
    if reading == "sequential":
        line = sum(documents, (task.begin,)) + question
        return lay_out([Segment(line)])
    apart = [Segment(document, (0,)) for document in documents]
    last = Segment(question, tuple(range(1, 1 + len(documents))))
    return lay_out([Segment((task.begin,)), *apart, last])


def visible_pairs(layout: Layout) -> int:
    """Pairs of a query and a key that sees it, over a whole text: what attention computes."""
    start, end = layout.runs[:, 0], layout.runs[:, 1]
    key = np.arange(layout.runs.shape[-1])
    return int(np.maximum(end - np.maximum(start, key), 0).sum())


def accuracy(
    model: LanguageModel,
    task: Lookup,
    texts: Iterable[Text],
    reading: str,
    temperature: float = 1.0,
    scale: float = 1.0,
) -> float:
    """Share of the texts whose first question a model answers rightly.

    Args:
      model: one that has learned the task.
      task: its shape.
      texts: to be read.
      reading: one of READINGS; temperature and scale are of the last alone.
    """
    engine = Engine(model, cache_tokens=64 * task.documents * task.length, rows=64)
    answers = {}
    for text in texts:
        documents = tuple(tuple(map(int, document)) for document in text.documents)
        prompt = (task.questions, int(text.asked[0]))
        if reading == "sequential":
            request = Request(sum(documents, (task.begin,)) + prompt, 1)
        else:
            factors = (temperature, scale) if reading == "ape" else (1.0, 1.0)
            script = layouts.Ape((task.begin,), documents, *factors)
            request = Request(prompt, 1, layout=script)
        answers[engine.submit(request)] = int(text.answers[0])
    results = engine.run()
    for result in results.values():
        if result.error is not None:
            raise result.error
    right = sum(results[number].tokens == [answer] for number, answer in answers.items())
    return right / len(answers)


class Score(NamedTuple):
    """How a model answers questions about documents that are read in one way.

    Attributes:
      documents: how many.
      reading: one of READINGS.
      accuracy: share of right answers.
      temperature, scale: of the attention to documents; 1 if not APE.
      visible_pairs: of query and key in a text up to its question.
    """

    documents: int
    reading: str
    accuracy: float
    temperature: float
    scale: float
    visible_pairs: int


def compare(
    model: LanguageModel, task: Lookup, validation: list[Text], test: list[Text]
) -> Iterator[Score]:
    """Scores of all READINGS on texts of as many documents each.

    Args:
      model: one that has learned the task.
      task: its shape.
      validation: texts on which APE's temperature and scale are chosen from GRID.
      test: the texts that count.
    """
    for reading in READINGS:
        factors = choose_factors(model, task, validation) if reading == "ape" else (1.0, 1.0)
        right = accuracy(model, task, test, reading, *factors)
        pairs = visible_pairs(read(task, test[0], reading))
        yield Score(len(test[0].documents), reading, right, *factors, pairs)


def choose_factors(model: LanguageModel, task: Lookup, texts: list[Text]) -> tuple[float, float]:
    """The temperature and scale of GRID with the best accuracy.

    Of several as good it takes those nearest to 1, which is plain parallel reading.
    """
    found = {factors: accuracy(model, task, texts, "ape", *factors) for factors in GRID}
    return max(GRID, key=lambda factors: (found[factors], sum(factors)))
