"""Lookup in documents: the texts against plain Python, answers against one reading of a mask."""

import io

import jax
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel
from pallas_kernels import masks
from parscale import lookup, tasks
from parscale.config import Config, DataConfig, TrainConfig
from parscale.lookup import Lookup
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization")

# Keys 0-8, values 9-13, then the tags of a text, a document, the questions: 14, 15, 16.
SMALL = Lookup(documents=4, pairs=2, keys=9, values=5, repeats=2)


def configure(task, **train):
    model = ModelConfig(
        vocab_size=task.vocab_size, width=32, layers=2, heads=2, kv_heads=2, mlp_width=32,
        init_std=0.3, max_length=task.length,
    )  # fmt: skip
    train = TrainConfig(**{"steps": 3, "warmup_steps": 1, "log_every": 100} | train)
    return Config(model, data=DataConfig(length=task.length, batch=8), train=train)


@pytest.mark.parametrize("documents", [1, 3])
def test_a_text(documents):
    text = lookup.draw(SMALL, documents, 2, np.random.default_rng(documents))
    known = {}
    for document in text.documents.tolist():
        assert document[0] == 15
        assert len(document) == 5
        known |= dict(zip(document[1::2], document[2::2], strict=True))
    assert len(known) == 2 * documents
    assert all(0 <= key < 9 <= value < 14 for key, value in known.items())
    asked = text.asked.tolist()
    for part in (asked[: len(known)], asked[len(known) :]):
        assert sorted(part) == sorted(known)
    assert text.answers.tolist() == [known[key] for key in asked]


@pytest.mark.parametrize(("keys", "documents", "pairs"), [(1, 1, 1), (2, 1, 2), (8, 4, 2)])
def test_rows(keys, documents, pairs):
    batch = lookup.draw_rows(SMALL, keys, 3, np.random.default_rng(0))
    size = 2 + documents * (1 + 2 * pairs) + 4 * keys
    assert SMALL.length == 56
    assert {array.shape for array in batch.values()} == {(3, 56)}
    for row in range(3):
        whole = 56 // size
        for number in range(whole):
            of = {
                name: array[row, number * size : (number + 1) * size].tolist()
                for name, array in batch.items()
            }
            ids, asked = of["ids"], [t for t in range(size) if of["mask"][t]]
            questions = ids.index(16)
            known = {}
            for first in range(1, questions, 1 + 2 * pairs):
                assert ids[first] == 15
                document = ids[first + 1 : first + 1 + 2 * pairs]
                known |= dict(zip(document[::2], document[1::2], strict=True))
            assert len(known) == keys
            assert ids[0] == 14
            assert asked == list(range(questions + 1, size, 2))
            assert [of["targets"][t] for t in asked] == [known[ids[t]] for t in asked]
            assert of["segment_ids"] == [number + 1] * size
            assert of["positions"] == list(range(size))
        assert not batch["mask"][row, whole * size :].any()
        assert not batch["segment_ids"][row, whole * size :].any()


@pytest.mark.parametrize("documents", [1, 3])
def test_readings(documents):
    """Documents in a row are one text; apart, all begin after the first tag."""
    text = lookup.draw(SMALL, documents, 2, np.random.default_rng(1))
    line = [14, *text.documents.ravel().tolist(), 16, int(text.asked[0])]
    layouts = {reading: lookup.read(SMALL, text, reading) for reading in lookup.READINGS}
    for layout in layouts.values():
        assert layout.ids.tolist() == line
    assert layouts["sequential"].positions.tolist() == list(range(len(line)))
    apart = [0, *[1, 2, 3, 4, 5] * documents, 6, 7]
    assert layouts["parallel"].positions.tolist() == apart
    for layout in layouts.values():
        dense = masks.dense(layout.mask, len(line), len(line))
        assert lookup.visible_pairs(layout) == int(dense.sum())
    # The tag; of each document 5 tokens that see it and themselves; the question sees all.
    by_hand = 1 + documents * (5 + 15) + 2 * (1 + 5 * documents) + 3
    assert lookup.visible_pairs(layouts["ape"]) == by_hand


def first_choices(model, task, texts, reading):
    """What one reading of each text through the mask of `read` gives for its first question."""
    run = jax.jit(lambda ids, **where: model(ids, **where))
    for text in texts:
        layout = lookup.read(task, text, reading)
        logits = run(layout.ids[None], positions=layout.positions[None], mask=layout.mask)
        yield int(np.asarray(logits)[0, -1].argmax())


@pytest.mark.parametrize("reading", lookup.READINGS)
def test_answers_are_those_of_one_reading(reading):
    """Those of APE with temperature and scale 1, too; half of the texts count as answered."""
    model = LanguageModel(configure(SMALL).model, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    texts = [lookup.draw(SMALL, 3, 2, random) for _ in range(6)]
    best = list(first_choices(model, SMALL, texts, reading))
    told = [
        text._replace(answers=np.array([choice + number % 2]))
        for number, (text, choice) in enumerate(zip(texts, best, strict=True))
    ]
    assert lookup.accuracy(model, SMALL, told, reading) == 0.5
    assert lookup.accuracy(model, SMALL, told[::2], reading) == 1.0


def test_factors_are_the_best_and_nearest_to_one(monkeypatch):
    def accuracy(model, task, texts, reading, temperature, scale):
        assert reading == "ape"
        return {True: 0.9, False: 0.5}[temperature == 0.7 and scale < 0.95]

    monkeypatch.setattr(lookup, "accuracy", accuracy)
    assert lookup.choose_factors(None, SMALL, []) == (0.7, 0.9)
    monkeypatch.setattr(lookup, "accuracy", lambda *_: 1.0)
    assert lookup.choose_factors(None, SMALL, []) == (1.0, 1.0)


def test_scores():
    model = LanguageModel(configure(SMALL).model, rngs=nnx.Rngs(0))
    random = np.random.default_rng(0)
    texts = [lookup.draw(SMALL, 2, 2, random) for _ in range(4)]
    scores = list(lookup.compare(model, SMALL, texts[:2], texts))
    assert [score.reading for score in scores] == list(lookup.READINGS)
    for score in scores:
        assert score.documents == 2
        assert score.accuracy in (0.0, 0.25, 0.5, 0.75, 1.0)
        assert score.visible_pairs == lookup.visible_pairs(
            lookup.read(SMALL, texts[0], score.reading)
        )
    assert [(score.temperature, score.scale) for score in scores[:2]] == [(1.0, 1.0)] * 2
    assert (scores[2].temperature, scores[2].scale) in lookup.GRID


@pytest.mark.slow
def test_a_model_learns():
    task = Lookup(documents=2, pairs=2, keys=4, values=4)
    model = ModelConfig(
        vocab_size=task.vocab_size, width=64, layers=3, heads=2, kv_heads=2, mlp_width=64,
        init_std=0.1, rope_theta=100.0, max_length=task.length,
    )  # fmt: skip
    train = TrainConfig(
        steps=1000, warmup_steps=50, learning_rate=5e-3, weight_decay=0.01, seed=1, log_every=500
    )
    config = Config(model, data=DataConfig(length=task.length, batch=16), train=train)

    def draw(step, random):
        return lookup.draw_rows(task, int(random.choice([2, 4])), 16, random)

    run = tasks.train(config, draw, log=io.StringIO())
    random = np.random.default_rng(1)
    texts = [lookup.draw(task, 2, 2, random) for _ in range(64)]
    # Naming any value of the text would be right some 40 % of the time.
    assert lookup.accuracy(run.model(), task, texts, "sequential") > 0.9


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"documents": 3}, "documents=3: expected a power of 2"),
        ({"pairs": 6}, "pairs=6: expected a power of 2"),
        ({"pairs": 0}, "pairs=0: expected at least 1"),
        ({"keys": 31}, "keys=31: expected at least 32"),
        ({"values": 1}, "values=1: expected at least 2"),
    ],
)
def test_bad_tasks(fields, message):
    with pytest.raises(InputError, match=message):
        Lookup(**fields)
