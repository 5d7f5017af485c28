"""Requests and engines that cannot be are refused by name."""

import dataclasses

import pytest
from engine_models import SMALL, make_model

from parscale.engine import Engine, Request
from sharding.settings import InputError

pytestmark = pytest.mark.usefixtures("little_optimization", "few_shapes")

ALONE = dataclasses.replace(SMALL, streams=1)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "request 1 is empty"),
        ({"tokens": 0}, "request 1: tokens=0: expected at least 1"),
        ({"prompt": [1, 31]}, "request 1 has token id 31, but the model's vocabulary is 31"),
        ({"prompt": [-1]}, "request 1 has token id -1"),
        ({"prompt": ["a"]}, "request 1 has 'a': expected token ids"),
        ({"prompt": [1.0]}, "request 1 has 1.0: expected token ids"),
        (
            {"prompt": [1] * 100},
            "request 1 of 100 tokens and 29 new ones are more than the model's",
        ),
        (
            {"prompt": [1] * 99},
            "request 1 needs 8 blocks of the cache for each stream, which has 4",
        ),
        ({"streams": 3}, "request 1 wants streams=3: the engine has models of 1"),
    ],
)
def test_requests_that_could_never_be_run(fields, message):
    engine = Engine(make_model(dataclasses.replace(ALONE, max_length=128)), cache_tokens=64)
    number = engine.submit(Request([1], 29))
    with pytest.raises(InputError) as error:
        engine.submit(Request(**{"prompt": [1], "tokens": 29} | fields))
    assert message in str(error.value)
    assert not engine.idle
    engine.cancel(number)
    assert engine.idle


def test_engines_that_cannot_be():
    models = {1: make_model(ALONE), 2: make_model()}
    for name in ("cache_tokens", "rows", "slots", "burst"):
        with pytest.raises(InputError, match=f"{name}=0: expected at least 1"):
            Engine(models, **{"cache_tokens": 64, name: 0})
    with pytest.raises(InputError, match="without a model"):
        Engine({}, cache_tokens=64)
    with pytest.raises(InputError, match="streams=4 has 2"):
        Engine({4: models[2]}, cache_tokens=64)
    with pytest.raises(InputError, match="layers=2 and 1"):
        Engine({1: models[1], 2: make_model(dataclasses.replace(SMALL, layers=1))}, cache_tokens=64)
    soft = make_model(dataclasses.replace(SMALL, transform="soft_tokens", transform_size=40))
    with pytest.raises(InputError, match="less than what stands before every text"):
        Engine(soft, cache_tokens=64)


def test_what_soft_tokens_hold_is_not_counted_as_room():
    model = make_model(dataclasses.replace(SMALL, transform="soft_tokens"))
    # 32 blocks, of which the soft tokens take one of each stream.
    engine = Engine(model, cache_tokens=512)
    with pytest.raises(InputError, match=r"request 0 needs 16 blocks .* which has 15"):
        engine.submit(Request([1] * 240, 10))
    engine.submit(Request([1] * 14, 226))
    assert engine.memory.most((0, 0)) == 15
