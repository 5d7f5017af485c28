"""Initial weights: the distributions that the configuration asks for."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from random_models import SMALL

from models import weights
from models.transformer import LanguageModel


def initial_weights(seed: int) -> dict[str, np.ndarray]:
    model = LanguageModel(SMALL, rngs=nnx.Rngs(seed))
    leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }


def test_initial_values():
    found = initial_weights(0)
    assert {array.dtype for array in found.values()} == {np.dtype("float32")}
    for name, array in found.items():
        if name.endswith("bias"):
            assert not array.any(), name
        elif name.endswith("scale"):
            assert (array == 1).all(), name
        else:
            # 0.02 for the backbone and, by default, for what the streams have of their own;
            # five standard deviations of an estimate from so many values.
            assert abs(array.std() / 0.02 - 1) < 5 / np.sqrt(2 * array.size), name
            assert abs(array.mean()) < 5 * 0.02 / np.sqrt(array.size), name
    # Layers and weights of one shape have values of their own.
    assert (found["layers.mixer.k"][0] != found["layers.mixer.k"][1]).all()
    assert (found["layers.mixer.k"] != found["layers.mixer.v"]).all()
    assert (initial_weights(1)["embedding"] != found["embedding"]).all()


def test_large_weights_have_the_values_of_a_flat_draw(monkeypatch):
    draw = weights.normal(0.5)
    flat = draw(jax.random.key(0), (3, 8, 5), jnp.float32)
    monkeypatch.setattr(weights, "FLAT_DRAW", 0)
    shaped = draw(jax.random.key(0), (3, 8, 5), jnp.float32)
    # The same bits are drawn; what makes them normal may be rounded otherwise by another program.
    np.testing.assert_allclose(shaped, flat, rtol=1e-6)
