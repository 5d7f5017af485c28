"""Growing the number of streams keeps every old weight and draws the new ones."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from random_models import SMALL, make_model

from models.growth import check_growable, grow_streams
from sharding.settings import InputError


def flat_params(params: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.parametrize("old_streams", [1, 2])
def test_old_weights_stay_and_new_ones_are_drawn(old_streams):
    old = dataclasses.replace(SMALL, streams=old_streams, transform_std=0.5)
    new = dataclasses.replace(old, streams=4)
    check_growable(old, new)
    model = make_model(old)
    given = flat_params(nnx.to_pure_dict(nnx.state(model)))
    grown = flat_params(grow_streams(nnx.to_pure_dict(nnx.state(model)), new, seed=1))
    expected = flat_params(nnx.to_pure_dict(nnx.state(make_model(new))))
    assert {name: array.shape for name, array in grown.items()} == {
        name: array.shape for name, array in expected.items()
    }
    for name, array in given.items():
        kept = grown[name][tuple(map(slice, array.shape))]
        assert kept.tobytes() == array.tobytes(), name
    name = "['layers']['mixer']['streams']['k']"
    drawn = grown[name][:, old_streams if old_streams > 1 else 0 :]
    assert 0.4 < drawn.std() < 0.6
    for other in range(3):
        assert np.abs(grown[name][:, other] - grown[name][:, other + 1]).max() > 0.1


def test_the_seed_of_new_streams_counts():
    old = dataclasses.replace(SMALL, streams=1)
    params = nnx.to_pure_dict(nnx.state(make_model(old)))
    new = dataclasses.replace(old, streams=4)
    drawn = [
        np.asarray(grow_streams(params, new, seed)["layers"]["mixer"]["streams"]["k"])
        for seed in (0, 0, 1)
    ]
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert np.abs(drawn[0] - drawn[2]).max() > 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 64, "layers": 3}, ("--config.model.width=32", "--config.model.layers=2")),
        ({"tied_embeddings": True}, ("--config.model.tied_embeddings=False",)),
        ({"transform": "bias"}, ("transform=prefix there and bias here",)),
        ({"transform_size": 9}, ("--config.model.transform_size=4",)),
        ({"streams": 2}, ("streams=2", "3 streams", "only grow")),
    ],
)
def test_another_shape_is_refused(changes, words):
    with pytest.raises(InputError) as error:
        check_growable(SMALL, dataclasses.replace(SMALL, **changes))
    for word in words:
        assert word in str(error.value)


def test_a_plain_model_may_start_streams_of_any_kind():
    plain = dataclasses.replace(SMALL, streams=1)
    new = dataclasses.replace(SMALL, transform="bias", aggregation="mean", smoothing=0.5)
    check_growable(plain, new)
    check_growable(SMALL, dataclasses.replace(SMALL, remat="full", dtype="bfloat16"))
