"""Multi-query associative recall (arXiv 2312.04927): the task that tells mixers' memories apart."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TextIO

import numpy as np

from parscale import tasks
from parscale.config import Config
from parscale.packing import Batch
from sharding.settings import InputError, check_at_least, option


@dataclasses.dataclass(frozen=True)
class Recall:
    """The shape of the task.

    A document of n pairs has 8 n tokens: n keys, all different and each followed by its value, then
    all pairs three times more, each time in another order. When a key comes again, its value is to
    be predicted. Token ids are the keys, from 0, and then the values.

    A row of the test is one document; a row of training may be several shorter ones
    (`tasks.lesson`).
    """

    length: int = option(256, "tokens in a row [T]; an eighth as many pairs are to be remembered")
    keys: int = option(128, "keys in the vocabulary")
    values: int = option(64, "values in the vocabulary")

    def __post_init__(self):
        check_at_least(self, 2, "values")
        if self.length < 8 or self.length & (self.length - 1):
            raise InputError(f"length={self.length}: expected a power of 2, at least 8")
        if self.keys < self.pairs:
            raise InputError(
                f"keys={self.keys}: expected at least the {self.pairs} pairs of "
                f"length={self.length}"
            )

    @property
    def pairs(self) -> int:
        """Pairs in a document of the test."""
        return self.length // 8

    @property
    def vocab_size(self) -> int:
        """Keys and values [V]."""
        return self.keys + self.values


class Score(NamedTuple):
    """What a model has learned.

    Attributes:
      accuracy: share of the values of the test's rows that it names.
      loss: of the last training batches, in nats per value that was asked.
      seconds: of training, compilation included.
    """

    accuracy: float
    loss: float
    seconds: float


def draw(task: Recall, pairs: int, rows: int, random: np.random.Generator) -> Batch:
    """Arrays `[rows, length]` as `Training` takes them; `mask` is 1 at the keys that are asked.

    Args:
      task: the shape of the task.
      pairs: in every document, a power of 2.
      rows: in the batch.
      random: where all choices come from.
    """
    size = 8 * pairs
    documents = rows * task.length // size
    shuffled = lambda n: random.permuted(np.tile(np.arange(n), (documents, 1)), axis=1)
    keys = shuffled(task.keys)[:, :pairs]
    values = task.keys + random.integers(task.values, size=keys.shape)
    shown = np.stack([keys, values], -1)
    again = [np.take_along_axis(shown, shuffled(pairs)[..., None], 1) for _ in range(3)]
    ids = np.concatenate([shown, *again], 1).reshape(rows, -1).astype(np.int32)
    place = np.arange(task.length, dtype=np.int32)
    asked = (place % size >= 2 * pairs) & (place % 2 == 0)
    every_row = lambda x: np.tile(x, (rows, 1))
    return {
        "ids": ids,
        "targets": np.roll(ids, -1, 1),
        "segment_ids": every_row(1 + place // size),
        "positions": every_row(place % size),
        "mask": every_row(asked.astype(np.float32)),
    }


def learn(
    task: Recall,
    config: Config,
    test_rows: int,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    log: TextIO | None = None,
) -> Score | None:
    """Trains a model on one device and tests it.

    Args:
      task: the shape of the task.
      config: the run; its vocabulary and length are the task's, and every random choice comes from
        `train.seed`.
      test_rows: rows of the test, a multiple of the batch.
      should_stop: asked after every step.
      log: where progress is shown; standard error by default.

    Returns:
      the score, or None if it was stopped.
    """
    rows = config.data.batch

    def draw_step(step: int, random: np.random.Generator) -> Batch:
        pairs = tasks.lesson(task.pairs, step, config.train.steps, random)
        return draw(task, pairs, rows, random)

    run = tasks.train(config, draw_step, should_stop=should_stop, log=log)
    if run is None:
        return None
    random = np.random.default_rng([config.train.seed, 1])
    tests = (draw(task, task.pairs, rows, random) for _ in range(test_rows // rows))
    return Score(tasks.accuracy(run.training, run.state, tests), run.loss, run.seconds)
