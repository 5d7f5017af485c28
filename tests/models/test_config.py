"""What a model's configuration refuses, and how it says so."""

import pytest

from models.config import ModelConfig
from sharding.settings import InputError, nearest


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"width": 130, "heads": 4}, ["width=130", "heads=4"]),
        ({"heads": 4, "kv_heads": 3}, ["heads=4", "kv_heads=3"]),
        ({"width": 12, "heads": 4}, ["width=12", "heads=4", "head dimension of 3"]),
        ({"streams": 0}, ["streams=0", "at least 1"]),
        ({"transform_size": 0}, ["transform_size=0", "at least 1"]),
        ({"vocab_size": 0}, ["vocab_size=0"]),
        ({"layers": -1}, ["layers=-1"]),
        ({"smoothing": 1.5}, ["smoothing=1.5", "from 0 to 1"]),
        ({"smoothing": -0.1}, ["smoothing=-0.1"]),
        ({"norm_eps": -1e-6}, ["norm_eps=-1e-06"]),
        ({"init_std": -1.0}, ["init_std=-1.0"]),
        ({"rope_theta": 0.0}, ["rope_theta=0.0"]),
        ({"transform": "prefx"}, ["transform='prefx'", 'did you mean "prefix"?']),
        ({"aggregation": "sum"}, ["aggregation='sum'", "dynamic, constant, mean"]),
        ({"dtype": "float16"}, ["dtype='float16'", "float32, bfloat16"]),
        ({"remat": "some"}, ["remat='some'", "none, full, dots"]),
    ],
)
def test_bad_value_is_named(values, words):
    with pytest.raises(InputError) as error:
        ModelConfig(**values)
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_good_values():
    assert ModelConfig(width=96, heads=6, kv_heads=6).head_dim == 16
    assert ModelConfig(streams=8, smoothing=0.0).streams == 8


def test_nearest_is_silent_about_strangers():
    assert nearest("zebra", ["prefix", "bias"]) == ""
    assert nearest("bais", ["prefix", "bias"]) == ' (did you mean "bias"?)'
