"""Every preset loads and validates, and the paper's have the published number of parameters."""

import importlib

import pytest

from experiments import program
from parscale import config_io, flops

# Width [D]: (preset, N at P = 1), as published.
PUBLISHED = {
    896: ("paper_0b5", 535813376),
    1024: ("paper_0b7", 693753856),
    1280: ("paper_1b1", 1088376320),
    1536: ("paper_1b6", 1571472384),
    2048: ("paper_2b8", 2774773760),
    2560: ("paper_4b4", 4353203200),
}


def parameters(preset, **model):
    config = config_io.replace(preset, {f"model.{name}": value for name, value in model.items()})
    return flops.parameter_counts(config.model)


def test_the_presets_are_these():
    paper = [name for name, _ in PUBLISHED.values()]
    assert program.presets() == sorted(["small", "tiny", *paper])


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
