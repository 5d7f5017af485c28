import jax
import numpy as np
import pytest

from models.config import ModelConfig
from parscale import recall, tasks
from parscale.config import Config, DataConfig, TrainConfig
from parscale.recall import Recall
from parscale.training import Training
from sharding.mesh import make_mesh
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization")


def configure(task, mixer="attention", layers=1, **train):
    model = ModelConfig(
        vocab_size=task.vocab_size, width=16, layers=layers, mixers=(mixer,), heads=1, kv_heads=1,
        mlp_width=16, init_std=0.2,
    )  # fmt: skip
    train = TrainConfig(**{"steps": 3, "warmup_steps": 1, "log_every": 1} | train)
    return Config(model, data=DataConfig(length=task.length, batch=8), train=train)


@pytest.mark.parametrize("pairs", [4, 2, 1])
def test_rows(pairs):
    task = Recall(length=32, keys=11, values=5)
    assert task.pairs == 4
    batch = recall.draw(task, pairs, 3, np.random.default_rng(0))
    kinds = {name: array.dtype for name, array in batch.items()}
    assert kinds.pop("mask") == np.float32
    assert set(kinds.values()) == {np.dtype(np.int32)}
    orders, size = set(), 8 * pairs
    for row in range(3):
        for number, start in enumerate(range(0, 32, size)):
            of = {name: array[row, start : start + size].tolist() for name, array in batch.items()}
            both = list(zip(of["ids"][::2], of["ids"][1::2], strict=True))
            shown, *again = (both[i : i + pairs] for i in range(0, 4 * pairs, pairs))
            known = dict(shown)
            assert len(known) == pairs
            assert [sorted(part) for part in again] == [sorted(shown)] * 3
            assert all(0 <= key < 11 <= value < 16 for key, value in shown)
            assert of["segment_ids"] == [number + 1] * size
            assert of["positions"] == list(range(size))
            asked = [t for t in range(size) if of["mask"][t]]
            assert asked == list(range(2 * pairs, size, 2))
            assert [of["targets"][t] for t in asked] == [known[of["ids"][t]] for t in asked]
            orders |= {tuple(shown.index(pair) for pair in part) for part in again}
    assert len(orders) > 1 or pairs == 1


def test_lessons_go_from_easy_to_hard():
    random = np.random.default_rng(0)
    drawn = [tasks.lesson(8, step, 800, random) for step in range(800)]
    # Sizes 1, 2, 4, 8, a new one after each eighth of the steps.
    for part, known in enumerate(([1], [1, 2], [1, 2, 4], [1, 2, 4, 8], *[[1, 2, 4, 8]] * 4)):
        of_part = drawn[100 * part : 100 * part + 100]
        assert set(of_part) == set(known)
        assert of_part.count(known[-1]) >= 45


def test_every_key_and_value_comes():
    task = Recall(length=16, keys=6, values=4)
    ids = recall.draw(task, 2, 200, np.random.default_rng(0))["ids"]
    assert set(ids.ravel()) == set(range(10))


def test_rows_follow_the_seed():
    task = Recall()
    first, same, other = (
        recall.draw(task, 32, 2, np.random.default_rng(seed))["ids"] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert np.any(first != other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"length": 250}, "length=250: expected a power of 2"),
        ({"length": 4}, "length=4: expected a power of 2, at least 8"),
        ({"keys": 31}, "keys=31: expected at least the 32 pairs of length=256"),
        ({"values": 1}, "values=1: expected at least 2"),
    ],
)
def test_bad_tasks(fields, message):
    with pytest.raises(InputError, match=message):
        Recall(**fields)


def test_accuracy():
    """Of a model that has learned nothing, against a count of its first choices."""
    task = Recall(length=16, keys=4, values=3)
    config = configure(task)
    training = Training(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = training.init()
    random = np.random.default_rng(0)
    batches = [recall.draw(task, 2, 8, random) for _ in range(2)]
    right = asked = 0
    with jax.set_mesh(training.mesh):
        model = training.model(state)
        logits = jax.jit(lambda ids, **where: model(ids, **where))
        for batch in batches:
            where = {name: batch[name] for name in ("positions", "segment_ids")}
            best = np.asarray(logits(batch["ids"], **where)).argmax(-1)
            places = batch["mask"] > 0
            right += np.sum(best[places] == batch["targets"][places])
            asked += np.sum(places)
    assert 0 < right < asked
    assert tasks.accuracy(training, state, batches) == pytest.approx(right / asked)


@pytest.mark.slow
def test_a_model_learns_and_repeats():
    task = Recall(length=16, keys=4, values=4)
    config = configure(
        task, "delta_net", 2, steps=800, warmup_steps=20, learning_rate=1e-2, log_every=100
    )
    first, again = (recall.learn(task, config, 64) for _ in range(2))
    # Naming either value of the row would be right about 60 % of the time.
    assert first.accuracy > 0.9
    assert (first.accuracy, first.loss) == (again.accuracy, again.loss)


def test_a_stopped_run_has_no_score(capfd):
    task = Recall(length=8, keys=4, values=3)
    assert recall.learn(task, configure(task), 8, should_stop=lambda: True) is None
    assert "step" not in capfd.readouterr().err
