"""Growing the number of streams keeps every old weight and draws the new ones."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx
from random_models import SMALL, make_model

from models.growth import begin_from, check_growable
from models.transformer import LanguageModel
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
    grown = flat_params(begin_from(new, jax.random.key(1), nnx.to_pure_dict(nnx.state(model))))
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
        np.asarray(begin_from(new, jax.random.key(seed), params)["layers"]["mixer"]["streams"]["k"])
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


def test_prefixes_from_tokens_are_the_keys_and_values_of_tokens():
    """Each slot is what a layer makes of one token of the vocabulary, by NumPy in float64."""
    plain = dataclasses.replace(SMALL, streams=1)
    new = dataclasses.replace(SMALL, streams=2, transform_init="tokens")
    params = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(make_model(plain))))
    grown = begin_from(new, jax.random.key(0), params)
    layers = jax.tree.map(lambda x: np.asarray(x, np.float64), grown["layers"])
    x = np.asarray(params["embedding"], np.float64)
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + new.norm_eps)
    mixer = layers["mixer"]
    found = []
    for layer in range(new.layers):
        normed = x * layers["mixer_norm"]["scale"][layer]
        for name in ("k", "v"):
            table = np.einsum("vd,dkh->vkh", normed, mixer[name][layer]) + (
                mixer[f"{name}_bias"][layer] if new.qkv_bias else 0
            )
            slots = mixer["streams"][name][layer].transpose(0, 2, 1, 3)
            distance = np.abs(slots[:, :, None] - table[None, None]).max((-1, -2))
            assert distance.min(-1).max() < 1e-5
            found.append(distance.argmin(-1))
    assert all((tokens == found[0]).all() for tokens in found)
    assert len(np.unique(found[0])) > found[0].size // 2


def test_a_model_begins_with_prefixes_from_its_own_tokens():
    new = dataclasses.replace(SMALL, streams=2, transform_init="tokens")
    normal = dataclasses.replace(new, transform_init="normal")
    built, drawn = (
        nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(0))))["layers"]["mixer"]
        for config in (new, normal)
    )
    assert np.abs(built["streams"]["k"] - drawn["streams"]["k"]).max() > 0.01
    np.testing.assert_array_equal(built["k"], drawn["k"])
