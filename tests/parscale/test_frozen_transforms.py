"""`train.trainable=all_but_transform`: prefixes stay as drawn, all else learns, runs resume."""

import random

import jax
import numpy as np
import pytest

from models.config import ModelConfig
from parscale import run, workdir
from parscale.config import Config, DataConfig, TrainConfig
from parscale.training import Training
from sharding.mesh import make_mesh


@pytest.fixture
def config(tmp_path):
    words = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(20):
        lines = (f"x = {words.randrange(99)} + {words.randrange(9)}" for _ in range(60))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    model = ModelConfig(
        width=16, layers=1, heads=2, kv_heads=1, mlp_width=32, streams=2, transform_size=4
    )
    train = TrainConfig(
        steps=4, learning_rate=0.01, warmup_steps=1, eval_rows=8, sample_tokens=0,
        checkpoint_minutes=0.0, checkpoint_every=1, trainable="all_but_transform",
    )  # fmt: skip
    data = DataConfig(corpus=str(folder), length=32, batch=8, held_out=0.3)
    return Config(model=model, data=data, train=train)


@pytest.mark.slow
def test_prefixes_stay_and_a_stopped_run_goes_on(config, tmp_path):
    devices = jax.devices()[:1]
    whole = run.train(config, tmp_path / "whole", devices=devices)
    asked = iter(range(10))
    stop = lambda: next(asked) >= 2
    assert run.train(config, tmp_path / "parts", devices=devices, should_stop=stop) is None
    parts = run.train(config, tmp_path / "parts", devices=devices)
    assert parts["weights_sha256"] == whole["weights_sha256"]
    found = workdir.load_weights(tmp_path / "parts").params
    training = Training(config, make_mesh(config.mesh, devices))
    begun = jax.tree.map(np.asarray, training.init().params())
    kept = found["layers"]["mixer"]["streams"]
    for name in ("k", "v"):
        np.testing.assert_array_equal(kept[name], begun["layers"]["mixer"]["streams"][name])
    assert np.abs(found["aggregation"]["out"] - begun["aggregation"]["out"]).max() > 1e-3
    assert np.abs(found["layers"]["mlp"]["up"] - begun["layers"]["mlp"]["up"]).max() > 1e-3
