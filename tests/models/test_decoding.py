"""Decoding with a cache gives what the whole forward pass gives, whatever the mixers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_models import SMALL, forward, in_blocks, make_model, random_ids

from models.config import MIXERS
from parscale import generate

LENGTHS = np.array([9, 6], np.int32)
STEPS = 3
CLOSE = 1e-5
"""Of the largest logit. Decoding takes the same float32 sums in another order, as if weights had
been rounded otherwise: one unit in the last place of each, 2^-23 of its value at most, moves these
models' logits by 2e-6 to 8e-6 of the largest."""


def decoded_and_full(config) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Logits of each row's tokens, by decoding and by one forward pass.

    The prompts, of different lengths, go into the cache in two parts, the shorter one padded
    behind its end; then the rows go on token by token, each from its own place.
    """
    graph, params = nnx.split(make_model(config))
    prompt, rest = random_ids(config, 2, 9), random_ids(config, 2, STEPS, seed=1)
    rows = np.zeros((2, 9 + STEPS), np.int32)
    for row, length, tokens, after in zip(rows, LENGTHS, prompt, rest, strict=True):
        row[: length + STEPS] = [*tokens[:length], *after]

    @jax.jit
    def run(params):
        model = nnx.merge(graph, params)
        cache, view = in_blocks(model, 2, 14)
        real = (np.arange(9) < LENGTHS[:, None]).astype(np.int32)
        parts = []
        for part in (slice(5), slice(5, 9)):
            places = jnp.broadcast_to(jnp.arange(9, dtype=jnp.int32)[part], real[:, part].shape)
            logits, cache = model(
                prompt[:, part],
                positions=places,
                segment_ids=real[:, part],
                cache=cache,
                view=view(places, real[:, part] > 0),
            )
            parts.append(logits)

        def step(carry, token):
            positions, cache = carry
            place = positions[:, None]
            logits, cache = model(token[:, None], positions=place, cache=cache, view=view(place))
            return (positions + 1, cache), logits[:, 0]

        _, new = jax.lax.scan(step, (jnp.asarray(LENGTHS), cache), jnp.asarray(rest.T))
        return jnp.concatenate(parts, 1), jnp.moveaxis(new, 0, 1), model(rows)

    prefilled, new, full = (np.asarray(array) for array in run(params))
    decoded = [
        np.concatenate([row[:length], after])
        for row, length, after in zip(prefilled, LENGTHS, new, strict=True)
    ]
    return decoded, [row[: length + STEPS] for row, length in zip(full, LENGTHS, strict=True)]


def assert_decodes_as_a_whole(config):
    for decoded, full in zip(*decoded_and_full(config), strict=True):
        np.testing.assert_allclose(decoded, full, rtol=0, atol=CLOSE * np.abs(full).max())


@pytest.mark.parametrize(
    ("streams", "transform", "layer_loop"),
    [
        (1, "prefix", "scan"),
        (2, "prefix", "unroll"),
        (2, "soft_tokens", "scan"),
        (2, "low_rank", "scan"),
        (2, "bias", "scan"),
        (8, "prefix", "scan"),
    ],
)
def test_cached_decoding_equals_the_forward_pass(streams, transform, layer_loop):
    config = dataclasses.replace(SMALL, streams=streams, transform=transform, layer_loop=layer_loop)
    assert_decodes_as_a_whole(config)


# Of window=4, so that its cache wraps around in the prefill and again in decoding.
PATTERNS = [
    ("retention", "window"),
    pytest.param(("gated_delta_net", "window", "mlstm_exp"), marks=pytest.mark.slow),
    *(pytest.param((mixer,), marks=pytest.mark.slow) for mixer in MIXERS),
]


@pytest.mark.parametrize("mixers", PATTERNS, ids=",".join)
def test_every_mixer_decodes_what_the_forward_pass_computes(mixers):
    layers = max(len(mixers), 2)
    config = dataclasses.replace(
        SMALL, streams=2, mixers=mixers, layers=layers, window=4, key_dim=6, layer_loop="scan"
    )
    assert_decodes_as_a_whole(config)


@pytest.mark.slow
def test_prompts_of_different_lengths_go_on_as_the_forward_pass_says():
    mixers = ("gated_delta_net", "mlstm_exp", "window", "aaren")
    config = dataclasses.replace(SMALL, streams=2, mixers=mixers, layers=4, window=5)
    model = make_model(config)
    prompts = [[7, 8, 9], [10], [11, 12, 13, 14, 15, 16, 17]]
    found = generate.generate(model, prompts, STEPS)
    for prompt, row in zip(prompts, found, strict=True):
        best = np.argmax(forward(model, np.array([[*prompt, *row]], np.int32))[0], -1)
        np.testing.assert_array_equal(row, best[len(prompt) - 1 : -1])


@pytest.mark.parametrize(
    ("mixers", "most"),
    [
        (("attention",), 0.02),
        # The norm of a head's output enlarges the roundings where the output is small.
        pytest.param(("kda", "mlstm_exp", "aaren"), 0.04, marks=pytest.mark.slow),
    ],
)
def test_cached_decoding_in_bfloat16(mixers, most):
    config = dataclasses.replace(
        SMALL, streams=2, mixers=mixers, layers=max(len(mixers), 2), layer_loop="scan",
        dtype="bfloat16",
    )  # fmt: skip
    for decoded, full in zip(*decoded_and_full(config), strict=True):
        # Sums in another order round to a neighbour now and then, 2^-8 of a value each time.
        error = np.sqrt(np.mean((decoded - full) ** 2) / np.mean(full**2))
        assert error < most
