"""Every preset loads and validates, and the paper's have the published number of parameters."""

import importlib

import jax
import numpy as np
import pytest

from experiments import program
from models.config import RECURRENT
from parscale import config_io, flops
from parscale.training import Training
from sharding.mesh import make_mesh

# Width [D]: (preset, N at P = 1), as published.
PUBLISHED = {
    896: ("paper_0b5", 535813376),
    1024: ("paper_0b7", 693753856),
    1280: ("paper_1b1", 1088376320),
    1536: ("paper_1b6", 1571472384),
    2048: ("paper_2b8", 2774773760),
    2560: ("paper_4b4", 4353203200),
}

OF_TINY = [f"tiny_{mixer}" for mixer in (*RECURRENT, "hybrid")]


def parameters(preset, **model):
    config = config_io.replace(preset, {f"model.{name}": value for name, value in model.items()})
    return flops.parameter_counts(config.model)


def test_the_presets_are_these():
    paper = [name for name, _ in PUBLISHED.values()]
    assert program.presets() == sorted(["small", "tiny", *paper, *OF_TINY])


@pytest.mark.parametrize("name", OF_TINY)
def test_presets_of_other_mixers_are_as_large_as_tiny(name):
    tiny, other = program.load_preset("tiny"), program.load_preset(name)
    sizes = [parameters(config)["non_embedding"] for config in (tiny, other)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)
    for part in ("width", "layers", "streams", "vocab_size"):
        assert getattr(other.model, part) == getattr(tiny.model, part)
    assert (other.data, other.train) == (tiny.data, tiny.train)
    expected = "attention" if name == "tiny_hybrid" else name.removeprefix("tiny_")
    assert other.model.mixers[-1] == expected


def text_batch(length: int) -> dict[str, np.ndarray]:
    """Two rows of letters, the first of two documents and the second with padding."""
    ids = np.random.default_rng(0).integers(97, 123, (2, length + 1), dtype=np.int32)
    place = np.arange(length)
    segments = np.stack([1 + (place >= 5), place < length - 3]).astype(np.int32)
    return {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segments,
        "positions": np.where(segments == 2, place - 5, place).astype(np.int32),
        "mask": (segments > 0).astype(np.float32),
    }


@pytest.mark.parametrize(
    "name",
    [
        "tiny_retention",
        *(pytest.param(n, marks=pytest.mark.slow) for n in OF_TINY if n != "tiny_retention"),
    ],
)
def test_presets_of_other_mixers_learn(name):
    changes = {"data.batch": 2, "data.length": 24, "train.warmup_steps": 0}
    changes |= {"model.streams": 2, "model.layer_loop": "scan"}
    config = config_io.replace(program.load_preset(name), changes)
    training = Training(config, make_mesh(config.mesh, jax.devices()[:1]))
    state, losses = training.init(), []
    for _ in range(5):
        state, metrics = training.step(state, text_batch(24))
        losses.append(float(metrics["loss"]))
    assert float(metrics["skipped"]) == 0
    assert losses[-1] < losses[0] - 0.1, losses


@pytest.mark.parametrize("name", program.presets())
def test_preset_validates_and_its_docstring_says_how_to_run_it(name):
    config = program.load_preset(name)
    assert config_io.from_dict(type(config), config_io.to_dict(config)) == config
    assert program.load_preset(str(program.PRESETS / f"{name}.py")) == config
    doc = importlib.import_module(f"experiments.configs.{name}").__doc__
    assert "python -m experiments.train --config=" in doc
    assert name in doc


@pytest.mark.parametrize("width", PUBLISHED)
def test_paper_shapes_have_the_published_parameters(width):
    name, plain = PUBLISHED[width]
    preset = program.load_preset(name)
    assert preset.model.width == width
    assert parameters(preset)["non_embedding"] == plain
    for streams in (2, 4, 8):
        # Prefix keys and values; the aggregation's two layers with their biases.
        prefix = streams * 36 * 2 * 48 * 2 * (width // 16)
        aggregation = (streams * width * width + width) + (width * streams + streams)
        found = parameters(preset, streams=streams)["non_embedding"]
        assert found == plain + prefix + aggregation
        doc = importlib.import_module(f"experiments.configs.{name}").__doc__
        assert f"N = {plain:,} with one" in doc
        assert streams != 8 or f"{found:,} with eight" in doc


def test_published_extremes_with_eight_streams():
    for name, expected in [("paper_0b5", 545340552), ("paper_4b4", 4414502408)]:
        assert parameters(program.load_preset(name), streams=8)["non_embedding"] == expected


def test_paper_recipe_is_42_billion_tokens():
    preset = program.load_preset("paper_1b6")
    assert preset.train.steps == 20_027
    tokens = preset.train.steps * preset.data.batch * preset.data.length
    assert abs(tokens - 42e9) < preset.data.batch * preset.data.length


def test_small_has_about_25_million_parameters_and_four_streams():
    preset = program.load_preset("small")
    assert preset.model.streams == 4
    assert 24e6 < parameters(preset)["total"] < 27e6
