"""Sums of lists: the texts against plain Python, and what a model writes against one reading."""

import io

import jax
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.segments import Rules, lay_out
from models.transformer import LanguageModel
from pallas_kernels import masks
from parscale import sums, tasks
from parscale.config import Config, DataConfig, TrainConfig
from parscale.engine import Engine, Ledger, Request, Result
from parscale.sums import Sums
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization")

SMALL = Sums(lists=2, digits=2, base=10)
SEED = 2
LISTS = np.array([[7, 5], [1, 3]])


def configure(task, **train):
    model = ModelConfig(
        vocab_size=task.vocab_size, width=32, layers=2, heads=2, kv_heads=2, mlp_width=32,
        init_std=0.3, rope_theta=100.0, max_length=2 * task.length,
    )  # fmt: skip
    train = TrainConfig(**{"steps": 3, "warmup_steps": 1, "log_every": 100} | train)
    return Config(model, data=DataConfig(length=task.length, batch=8), train=train)


def test_a_text_by_hand():
    # Digits 0-9, then: conclusion 10, end 11, paths 12 13, sums 14 15, items 16 17 and 18 19.
    prompt, paths, conclusion = sums.texts(SMALL, LISTS)
    assert prompt == (16, 7, 17, 5, 18, 1, 19, 3)
    assert paths == [(12, 16, 7, 7, 17, 5, 2, 14, 2, 11), (13, 18, 1, 1, 19, 3, 4, 15, 4, 11)]
    assert conclusion == (10, 14, 2, 2, 15, 4, 6, 11)
    assert sums.answer(SMALL, LISTS) == 6
    assert SMALL.vocab_size == 20
    lengths = (SMALL.prompt_length, SMALL.path_length, SMALL.conclusion_length)
    assert lengths == (len(prompt), len(paths[0]), len(conclusion))
    assert SMALL.length == 40


@pytest.mark.parametrize("seed", range(3))
def test_every_sum_is_right(seed):
    task = Sums(lists=3, digits=4, base=7)
    (lists,) = sums.draw(task, 1, np.random.default_rng(seed))
    prompt, paths, conclusion = sums.texts(task, lists)
    assert list(prompt[1::2]) == [digit for digits in lists for digit in digits]
    total = 0
    for number, (digits, path) in enumerate(zip(lists, paths, strict=True)):
        so_far = 0
        for place, digit in enumerate(digits):
            so_far = (so_far + int(digit)) % 7
            item = prompt[2 * (4 * number + place)]
            assert path[1 + 3 * place : 4 + 3 * place] == (item, digit, so_far)
        total = (total + so_far) % 7
        assert path[-2] == so_far
        assert conclusion[2 + 3 * number : 4 + 3 * number] == (so_far, total)
    assert conclusion[-2] == total == sums.answer(task, lists)


@pytest.mark.parametrize("form", sums.FORMS)
def test_rows(form):
    """What counts is all that a model writes itself, and a path sees nothing of the other."""
    batch = sums.to_rows(SMALL, LISTS[None], form)
    parts = sums.texts(SMALL, LISTS)
    ids = [*parts[0], *parts[1][0], *parts[1][1], *parts[2]]
    assert batch["ids"][0].tolist() == ids + [0] * (40 - len(ids))
    first = {8, 18, 28}  # of both paths and the conclusion: given
    asked = [t for t in range(40) if batch["mask"][0, t]]
    assert asked == [t for t in range(7, 35) if t + 1 not in first]
    assert [batch["targets"][0, t] for t in asked] == [ids[t + 1] for t in asked]
    seen = np.asarray(masks.dense(masks.Mask(batch["runs"][0], causal=True, queries=40), 40, 40))
    fork = form == "fork"
    assert seen[18:28, 8:18].any() != fork
    assert seen[28, :28].all()
    assert batch["positions"][0, [8, 18, 28]].tolist() == ([8, 8, 18] if fork else [8, 18, 28])


def recorded(script, parts):
    """The script, which leaves in `parts` what was written and what was generated after it."""

    def layout(root, request):
        steps, writes = script(root, request), None
        while True:
            try:
                writes = next(steps)
            except StopIteration as stop:
                return stop.value
            yield writes
            parts.extend((write.tokens, tuple(write.branch.new)) for write in writes)

    return layout


@pytest.mark.parametrize(
    ("form", "rules"),
    [
        ("sequential", Rules()),
        ("fork", Rules()),
        ("fork", Rules("flat")),
        ("fork", Rules(join="concatenated")),
    ],
)
def test_what_is_written_is_the_first_choice_of_one_reading(form, rules):
    """A model's own text, read at once through the mask, predicts each token that it wrote."""
    model = LanguageModel(configure(SMALL).model, rngs=nnx.Rngs(SEED))
    parts = []
    engine = Engine(model, cache_tokens=512, rows=4)
    prompt = sums.texts(SMALL, LISTS)[0]
    layout = recorded(sums.Script(SMALL, form, rules), parts)
    number = engine.submit(Request(prompt, 20, layout=layout))
    result = engine.run()[number]
    assert result.error is None
    *paths, conclusion = [(given[-1], *new) for given, new in parts if new]
    assert [path[0] for path in paths] == [12, 13]
    # Positions of the other rules are for paths of full length.
    assert [len(path) for path in paths] == [SMALL.path_length] * 2
    read = lay_out(sums.arrange(prompt, paths, conclusion, form), rules)
    logits = jax.jit(lambda ids, **where: model(ids, **where))(
        read.ids[None], positions=read.positions[None], mask=read.mask
    )
    best = np.asarray(logits)[0].argmax(-1)
    first = 8 + np.cumsum([0, *map(len, paths)])
    written = [t for t in range(8, len(read.ids)) if t not in first]
    assert [best[t - 1] for t in written] == [read.ids[t] for t in written]
    assert tuple(result.tokens) == conclusion[1:]
    assert result.ledger.generated == len(written)
    longest = len(conclusion) - 1 + (SMALL.path_length - 1) * (2 if form == "sequential" else 1)
    assert result.ledger.longest == longest


def test_right_answers_are_counted(monkeypatch):
    """Only a text that ends with the total and the end tag counts."""
    ends = [[4, 6, 11], [4, 7, 11], [4, 11, 6], [6], [6, 11]]

    class Told:
        """An engine that gives these ends of texts, in the order of the requests."""

        def __init__(self, model, **sizes):
            self.requests = 0

        def submit(self, request):
            self.requests += 1
            return 10 + self.requests

        def run(self):
            return {11 + n: Result(end, Ledger(20 + n, 10 + n, 9)) for n, end in enumerate(ends)}

    monkeypatch.setattr(sums, "Engine", Told)
    lists = np.tile(LISTS, (5, 1, 1))
    assert sums.evaluate(None, SMALL, lists, "fork") == (2 / 5, 22.0, 12.0)


@pytest.mark.slow
def test_a_text_known_by_heart_is_written():
    """And after another prompt too, where it is wrong."""
    config = configure(SMALL, steps=80, warmup_steps=5, learning_rate=1e-2)
    row = sums.to_rows(SMALL, np.tile(LISTS, (8, 1, 1)), "fork")
    run = tasks.train(config, lambda step, random: row, log=io.StringIO())
    assert tasks.accuracy(run.training, run.state, [row]) == 1.0
    assert sums.evaluate(run.model(), SMALL, LISTS[None], "fork") == (1.0, 25.0, 16.0)
    both = np.stack([LISTS, LISTS + np.array([[0, 0], [1, 0]])])
    assert sums.evaluate(run.model(), SMALL, both, "fork").accuracy == 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lists": 1}, "lists=1: expected at least 2"),
        ({"digits": 0}, "digits=0: expected at least 1"),
        ({"base": 1}, "base=1: expected at least 2"),
    ],
)
def test_bad_tasks(fields, message):
    with pytest.raises(InputError, match=message):
        Sums(**fields)
