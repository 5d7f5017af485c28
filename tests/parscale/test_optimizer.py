"""Schedules at given steps, and AdamW against a few lines of NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parscale.config import TrainConfig
from parscale.optimizer import learning_rate, make_optimizer
from sharding.settings import InputError


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"schedule": "cosine", "warmup_steps": 10, "steps": 110},
            # Half of the cosine: (1 + 0.1) / 2; a quarter: 0.1 + 0.9 (1 + cos(pi / 4)) / 2.
            {0: 0.0, 5: 0.5, 10: 1.0, 35: 0.868198, 60: 0.55, 110: 0.1, 200: 0.1},
        ),
        (
            {"schedule": "cosine", "warmup_steps": 0, "steps": 100, "final_rate": 0.0},
            {0: 1.0, 50: 0.5, 100: 0.0},
        ),
        (
            {"schedule": "constant", "warmup_steps": 4, "steps": 100},
            {0: 0.0, 1: 0.25, 3: 0.75, 4: 1.0, 99: 1.0},
        ),
        (
            {"schedule": "wsd", "warmup_steps": 10, "steps": 100, "decay_steps": 20},
            {0: 0.0, 10: 1.0, 79: 1.0, 80: 1.0, 90: 0.55, 95: 0.325, 100: 0.1, 150: 0.1},
        ),
    ],
)
def test_learning_rates(settings, expected):
    schedule = learning_rate(TrainConfig(learning_rate=2e-3, **settings))
    for step, share in expected.items():
        np.testing.assert_allclose(schedule(step), 2e-3 * share, rtol=1e-5, atol=1e-10)


def test_schedules_that_cannot_be_are_refused():
    for settings, word in (
        ({"schedule": "cosin"}, '"cosine"'),
        ({"schedule": "wsd"}, "decay_steps"),
        ({"schedule": "wsd", "decay_steps": 60, "warmup_steps": 50, "steps": 100}, "more than"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0"),
    ):
        with pytest.raises(InputError, match=word):
            TrainConfig(**settings)


def numpy_adamw(params, gradients, config, decays):
    """AdamW (arXiv 1711.05101) with clipping, as the paper writes it."""
    first = {name: 0.0 for name in params}
    second = {name: 0.0 for name in params}
    for step, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        scale = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, g in gradient.items():
            first[name] = config.b1 * first[name] + (1 - config.b1) * g * scale
            second[name] = config.b2 * second[name] + (1 - config.b2) * (g * scale) ** 2
            update = first[name] / (1 - config.b1**step)
            update = update / (np.sqrt(second[name] / (1 - config.b2**step)) + config.adam_eps)
            if decays[name]:
                update = update + config.weight_decay * params[name]
            params = params | {name: params[name] - config.learning_rate * update}
    return params


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_updates_are_those_of_adamw(clip_norm):
    config = TrainConfig(
        schedule="constant", warmup_steps=0, learning_rate=0.05, clip_norm=clip_norm,
        weight_decay=0.3, b1=0.8, b2=0.9,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    params = {"matrix": rng.normal(size=(4, 3)), "bias": rng.normal(size=3)}
    # The second is smaller than the clip, the others are greater.
    gradients = [
        {name: size * rng.normal(size=p.shape) for name, p in params.items()}
        for size in (1.0, 0.05, 20.0)
    ]
    decays = {"matrix": True, "bias": False}
    optimizer = make_optimizer(config, decays)
    found = jax.tree.map(lambda p: jnp.asarray(p, jnp.float32), params)
    state = optimizer.init(found)
    for gradient in gradients:
        gradient = jax.tree.map(lambda g: jnp.asarray(g, jnp.float32), gradient)
        updates, state = optimizer.update(gradient, state, found)
        found = jax.tree.map(jnp.add, found, updates)
    expected = numpy_adamw(params, gradients, config, decays)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
