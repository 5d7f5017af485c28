"""Products with several weights, joined or not."""

import jax
import numpy as np
import pytest

from models.layers import FEW_TOKENS, project


@pytest.mark.parametrize("tokens", [FEW_TOKENS // 2, FEW_TOKENS])
def test_products_with_several_weights(tokens):
    rng = np.random.default_rng(0)
    shapes = [(16, 4, 8), (16, 2, 8), (16, 24)]
    x, *weights = (
        rng.normal(size=shape).astype(np.float32) for shape in [(2, tokens, 16), *shapes]
    )
    for found, weight in zip(jax.jit(project)(x, *weights), weights, strict=True):
        # Sums of 16 products of float32, of size 4.
        np.testing.assert_allclose(found, np.tensordot(x, weight, 1), rtol=0, atol=1e-5)
