"""The short convolution over the sequence axis: only the tokens before a part travel."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sequence_cases import errors, on_mesh, spec, with_gradients

from models.context import Context
from models.convolution import convolve

B, P, T, H, h, SIZE = 2, 2, 16, 2, 4, 4


def arguments(begun):
    random = np.random.default_rng(0)
    shapes = {"x": (B, P, T, H, h), "taps": (SIZE, H, h)}
    if begun:
        shapes["begun"] = (1, P, SIZE - 1, H, h)
    x = {name: jnp.asarray(random.standard_normal(s), jnp.float32) for name, s in shapes.items()}
    if begun:
        x["begun"] = jnp.tile(x["begun"], (B, 1, 1, 1, 1))
    # Documents begin just before, on and after the borders of 4 parts; a row ends in padding.
    ids = np.stack([np.repeat([1, 2, 3, 4], [3, 5, 1, 7]), np.repeat([1, 2, 0], [9, 3, 4])])
    return x, jnp.asarray(ids, jnp.int32)


def op(x, ids):
    context = Context(jnp.zeros((B, T), jnp.int32), {}, segment_ids=ids)
    return convolve(**x, context=context)


@pytest.mark.parametrize("parts", [4, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("begun", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equals_one_device(little_optimization, begun, parts):
    """With 8 parts a part is shorter than what stands before it. One product of T values for each
    number: 1e-6 in float32."""
    x, ids = arguments(begun)
    expected = with_gradients(op, x, ids)
    with on_mesh(sequence=parts):
        got = with_gradients(op, x, ids)
    assert max(errors(got, expected).values()) < 1e-6


def test_what_travels():
    x, _ = arguments(begun=False)
    with on_mesh(sequence=4) as mesh:
        x["x"] = jax.device_put(x["x"], jax.NamedSharding(mesh, spec()))
        text = jax.jit(lambda x: op(x, None)[0]).lower(x).compile().as_text()
    moved = re.findall(r"= (\S+) (?:all-\w+|collective-permute|reduce-scatter)\(", text)
    assert [shape.split("{")[0] for shape in moved] == [f"f32[{B},{P},{SIZE - 1},{H},{h}]"]
