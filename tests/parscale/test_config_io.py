"""Configurations as dictionaries and files, and what may change on resuming."""

import dataclasses
import json
import os

import pytest

from models.config import ModelConfig
from parscale import config_io
from parscale.config import Config, DataConfig, TrainConfig
from sharding.mesh import MeshConfig
from sharding.settings import InputError, option


@pytest.fixture
def config():
    return Config(
        model=ModelConfig(streams=4, qkv_bias=False, norm_eps=3e-7),
        mesh=MeshConfig(data=2),
        data=DataConfig(corpus="a, b"),
        train=TrainConfig(learning_rate=0.1 + 0.2),
    )


@dataclasses.dataclass(frozen=True)
class Inner:
    sizes: tuple[int, ...] = option((1, 2), "sizes")
    names: tuple[str, ...] = option((), "names")


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = dataclasses.field(default_factory=Inner)


def test_every_field_has_help_and_a_resume_policy():
    for name, _, field in config_io.leaves(Config):
        assert field.metadata["doc"], name
        assert field.metadata["resume"] in ("fixed", "growable", "free"), name


def test_round_trips_are_exact(config, tmp_path):
    assert config_io.from_dict(Config, config_io.to_dict(config)) == config
    assert config_io.from_dict(Config, json.loads(json.dumps(config_io.to_dict(config)))) == config
    config_io.to_json(config, tmp_path / "config.json")
    assert config_io.from_json(Config, tmp_path / "config.json") == config
    assert os.listdir(tmp_path) == ["config.json"]


def test_tuples_survive_json(tmp_path):
    outer = Outer(Inner(sizes=(3, 4, 5), names=("a",)))
    config_io.to_json(outer, tmp_path / "x.json")
    assert config_io.from_json(Outer, tmp_path / "x.json") == outer


def test_a_failed_write_leaves_the_old_file(config, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    config_io.to_json(config, path)
    before = path.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        config_io.to_json(Config(), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["config.json"]


def test_flat_names_cover_every_value(config):
    flat = config_io.flatten(config)
    assert flat["model.streams"] == 4
    assert flat["data.corpus"] == "a, b"
    assert list(flat) == [leaf.name for leaf in config_io.leaves(Config)]
    assert config_io.replace(Config(), flat) == config


def test_missing_fields_take_their_defaults():
    config = config_io.from_dict(Config, {"model": {"streams": 2}})
    assert config == Config(model=ModelConfig(streams=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": {}}, 'modle: no such configuration field (did you mean "model"?)'),
        ({"model": {"stream": 4}}, 'model.stream: no such .* (did you mean "model.streams"?)'),
        ({"model": {"streams": "4"}}, "model.streams='4': expected an integer"),
        ({"model": {"streams": 4.0}}, "model.streams=4.0: expected an integer"),
        ({"model": {"streams": True}}, "model.streams=True: expected an integer"),
        ({"model": {"qkv_bias": 1}}, "model.qkv_bias=1: expected true or false"),
        ({"train": {"learning_rate": "x"}}, "train.learning_rate='x': expected a finite number"),
        ({"train": {"b1": float("nan")}}, "train.b1=nan: expected a finite number"),
        ({"data": {"corpus": None}}, "data.corpus=None: expected text"),
        ({"model": 3}, "model=3: expected a section"),
        ({"model": {"streams": 0}}, "streams=0: expected at least 1"),
    ],
)
def test_bad_dictionaries_are_refused_by_name(values, message):
    pattern = message.replace("(", r"\(").replace(")", r"\)").replace("?", r"\?")
    with pytest.raises(InputError, match=pattern):
        config_io.from_dict(Config, values)


def test_an_integer_will_do_for_a_float():
    config = config_io.replace(Config(), {"train.learning_rate": 1})
    assert type(config.train.learning_rate) is float


def test_replace_validates_all_changes_together():
    config = config_io.replace(Config(), {"model.heads": 6, "model.width": 96})
    assert (config.model.heads, config.model.width) == (6, 96)
    with pytest.raises(InputError, match="heads=6"):
        config_io.replace(Config(), {"model.heads": 6})
    with pytest.raises(InputError, match=r'did you mean "train\.learning_rate"'):
        config_io.replace(Config(), {"train.learning_rat": 1.0})
    with pytest.raises(InputError, match="model: no such"):
        config_io.replace(Config(), {"model": ModelConfig()})


def test_nearest_name_prefers_a_slip_then_a_namesake():
    names = [leaf.name for leaf in config_io.leaves(Config)]
    for wrong, right in [
        ("model.stream", "model.streams"),
        ("mesh.streams", "mesh.stream"),
        ("streams", "model.streams"),
        ("train.kv_heads", "model.kv_heads"),
        ("modell.kv_head", "model.kv_heads"),
    ]:
        assert config_io.nearest_name(wrong, names) == f' (did you mean "{right}"?)'
    assert config_io.nearest_name("zzz", names) == ""


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "-3", -3),
        (float, "3", 3.0),
        (float, "1e-4", 1e-4),
        (bool, "True", True),
        (bool, "0", False),
        (str, "a,b", "a,b"),
        (tuple[int, ...], "1,2", (1, 2)),
        (tuple[str, ...], "", ()),
    ],
)
def test_text_of_a_value(kind, text, value):
    assert config_io.parse(kind, text) == value


@pytest.mark.parametrize(
    ("kind", "text"),
    [(int, "4.0"), (int, ""), (float, "inf"), (float, "x"), (bool, "yes!"), (tuple[int, ...], "a")],
)
def test_text_of_another_type_is_refused(kind, text):
    with pytest.raises(ValueError, match="expected"):
        config_io.parse(kind, text)


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(InputError, match="no such file"):
        config_io.from_json(Config, path)
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(InputError, match="not a configuration in JSON"):
        config_io.from_json(Config, path)
    path.write_text('{"model": ')
    with pytest.raises(InputError, match="not a configuration in JSON"):
        config_io.from_json(Config, path)
    path.write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        config_io.from_json(Config, path)
    path.write_text('{"model": {"strems": 1}}')
    with pytest.raises(InputError, match=r'config\.json: model\.strems.*"model\.streams"'):
        config_io.from_json(Config, path)


def test_free_fields_may_change(config):
    free = {"train.steps": 5000, "mesh.data": 4, "train.keep": 9, "model.remat": "full"}
    config_io.check_resumable(config, config_io.replace(config, free))


def test_fixed_fields_are_refused_by_name_all_at_once(config):
    now = config_io.replace(config, {"train.learning_rate": 0.003, "model.width": 256})
    with pytest.raises(InputError) as error:
        config_io.check_resumable(config_io.replace(config, {"train.learning_rate": 0.001}), now)
    message = str(error.value)
    assert "train.learning_rate: 0.001 in the workdir, 0.003 now" in message
    assert "model.width: 128 in the workdir, 256 now" in message
    assert "--workdir" in message
    assert "\n" not in message


def test_streams_grow_only_upward_and_only_when_asked(config):
    more = config_io.replace(config, {"model.streams": 8})
    with pytest.raises(InputError, match=r"model\.streams: 4 .* 8 now \(--grow_streams"):
        config_io.check_resumable(config, more)
    config_io.check_resumable(config, more, grow=True)
    with pytest.raises(InputError, match="can only grow"):
        config_io.check_resumable(more, config, grow=True)
    both = config_io.replace(more, {"train.seed": 7})
    with pytest.raises(InputError) as error:
        config_io.check_resumable(config, both, grow=True)
    assert "train.seed" in str(error.value)
    assert "model.streams" not in str(error.value)
