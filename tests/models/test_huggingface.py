"""Hugging Face directories: the authors' own figures, exact round trips, and what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import qwen2_reference as reference
from flax import nnx
from random_models import SMALL, forward, make_model
from safetensors.numpy import load_file

from models import huggingface
from models.config import ModelConfig
from models.transformer import LanguageModel
from parscale import generate
from sharding.settings import InputError

GOLDEN = Path(__file__).parent.parent / "data" / "parscale_p2"
TIED = reference.CONFIG | {"tie_word_embeddings": True}


@pytest.fixture(scope="module")
def golden():
    return huggingface.load(GOLDEN)


@pytest.fixture(scope="module")
def expected():
    return np.load(GOLDEN / "expected.npz")


def with_config(model: LanguageModel, **changes) -> LanguageModel:
    config = dataclasses.replace(model.config, **changes)
    graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.to_pure_dict(nnx.state(model)))


def assert_same_tensors(first: Path, second: Path) -> None:
    old, new = read_tensors(first), read_tensors(second)
    assert old.keys() == new.keys()
    for name, array in old.items():
        assert new[name].dtype == array.dtype, name
        assert new[name].shape == array.shape, name
        assert new[name].tobytes() == array.tobytes(), name


def read_tensors(directory: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for path in directory.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_logits_are_those_of_the_authors_code(golden, expected, layer_loop):
    logits = forward(with_config(golden, layer_loop=layer_loop), expected["ids"])
    assert np.abs(logits - expected["logits"]).max() < 2e-5


def test_the_greedy_continuation_is_that_of_the_authors_code(golden, expected):
    prompts = expected["prompt"]
    tokens = expected["generated"].shape[1] - prompts.shape[1]
    new = generate.generate(golden, prompts.tolist(), tokens)
    np.testing.assert_array_equal(np.concatenate([prompts, new], 1), expected["generated"])


def test_settings_come_from_the_checkpoint(golden):
    assert golden.config == ModelConfig(
        vocab_size=257, width=64, layers=3, heads=4, kv_heads=2, mlp_width=160, streams=2,
        tied_embeddings=False, rope_theta=1e6, max_length=512, smoothing=0.01,
    )  # fmt: skip


def test_what_was_imported_is_exported_tensor_by_tensor(golden, tmp_path):
    huggingface.save(golden, tmp_path / "plain")
    assert_same_tensors(GOLDEN, tmp_path / "plain")
    huggingface.save(golden, tmp_path / "like", like=GOLDEN)
    assert_same_tensors(GOLDEN, tmp_path / "like")
    # Each of their settings is kept, also those that we do not read.
    theirs = json.loads((GOLDEN / "config.json").read_text())
    ours = json.loads((tmp_path / "like" / "config.json").read_text())
    assert theirs.items() <= ours.items()
    assert huggingface.read_config(tmp_path / "plain") == golden.config


@pytest.mark.parametrize("config", [reference.CONFIG, TIED], ids=["untied", "tied"])
def test_plain_models_round_trip(config, tmp_path):
    tensors = reference.random_tensors(config)
    source = reference.write_directory(tmp_path / "source", config, tensors)
    model = huggingface.load(source)
    assert model.config.streams == 1
    assert model.config.tied_embeddings == config["tie_word_embeddings"]
    huggingface.save(model, tmp_path / "copy")
    assert_same_tensors(source, tmp_path / "copy")
    ids = np.random.default_rng(1).integers(0, config["vocab_size"], (1, 6), dtype=np.int32)
    expected = reference.logits(config, tensors, ids)
    np.testing.assert_allclose(forward(model, ids), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_loaded_as_float32_and_saved_as_it_was(dtype, tmp_path):
    config = reference.PARSCALE | {"torch_dtype": dtype}
    tensors = {
        name: array.astype(jnp.dtype(dtype))
        for name, array in reference.random_tensors(config).items()
    }
    source = reference.write_directory(tmp_path / "source", config, tensors)
    (source / "tokenizer.json").write_text("{}")
    model = huggingface.load(source)
    assert {leaf.dtype for leaf in nnx.to_flat_state(nnx.state(model)).leaves} == {
        jnp.dtype("float32")
    }
    huggingface.save(model, tmp_path / "copy", like=source)
    assert_same_tensors(source, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"


@pytest.mark.parametrize(
    "settings", [{"torch_dtype": None}, {"torch_dtype": None, "dtype": "bfloat16"}]
)
def test_the_type_of_weights_is_found_under_either_name(settings, tmp_path):
    config = reference.CONFIG | settings
    dtype = settings.get("dtype", "float32")
    tensors = reference.random_tensors(config)
    tensors = {name: array.astype(jnp.dtype(dtype)) for name, array in tensors.items()}
    source = reference.write_directory(tmp_path / "source", config, tensors)
    huggingface.save(huggingface.load(source), tmp_path / "copy", like=source)
    assert_same_tensors(source, tmp_path / "copy")


def test_shards_round_trip(golden, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface, "SHARD_BYTES", 200_000)
    huggingface.save(golden, tmp_path)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 4
    assert all(path.stat().st_size < 210_000 for path in shards)
    index = json.loads((tmp_path / huggingface.INDEX).read_text())
    for path in shards:
        for name in load_file(path):
            assert index["weight_map"][name] == path.name
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in read_tensors(GOLDEN).values())
    assert_same_tensors(GOLDEN, tmp_path)
    again = huggingface.load_params(tmp_path, golden.config)
    assert again["embedding"].tobytes() == np.asarray(golden.embedding[...]).tobytes()


def test_saving_over_an_older_model_leaves_nothing_of_it(golden, tmp_path, monkeypatch):
    older = with_config(golden)
    older.embedding[...] = jnp.zeros_like(older.embedding[...])
    huggingface.save(older, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "SHARD_BYTES", 200_000)
        huggingface.save(golden, tmp_path)
    assert huggingface.load_params(tmp_path, golden.config)["embedding"].any()
    huggingface.save(older, tmp_path)
    assert [path.name for path in huggingface.weight_files(tmp_path)] == [huggingface.WEIGHTS]
    assert not (tmp_path / huggingface.INDEX).exists()


def test_what_the_layout_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    for changes, word in (
        ({"transform": "low_rank"}, "transform=low_rank"),
        ({"transform": "soft_tokens"}, "transform=soft_tokens"),
        ({"aggregation": "mean"}, "aggregation=mean"),
        ({"qkv_bias": False}, "qkv_bias=False"),
    ):
        with pytest.raises(InputError, match=word):
            huggingface.save(make_model(dataclasses.replace(SMALL, **changes)), tmp_path / "new")
        assert not (tmp_path / "new").exists()


def test_a_model_of_single_layers_is_exported_as_well(golden, tmp_path):
    huggingface.save(golden.unstack(), tmp_path)
    assert_same_tensors(GOLDEN, tmp_path)


def changed_tensors(directory: Path, change) -> Path:
    tensors = reference.random_tensors(reference.CONFIG)
    change(tensors)
    return reference.write_directory(directory, reference.CONFIG, tensors)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((2, 2), np.float32)
        tensors["model.norm.weight"] = np.zeros((23,), np.float32)

    with pytest.raises(InputError) as error:
        huggingface.load(changed_tensors(tmp_path, change))
    message = str(error.value)
    assert "missing model.layers.1.mlp.up_proj.weight" in message
    assert "unknown model.layers.2.mlp.up_proj.weight" in message
    assert "model.norm.weight [23] (expected [24])" in message
    assert "\n" not in message


def test_a_head_that_is_tied_by_name_alone_is_refused(tmp_path):
    tensors = reference.random_tensors(TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    huggingface.load(reference.write_directory(tmp_path, TIED, tensors))
    tensors["lm_head.weight"][0, 0] += 1
    with pytest.raises(InputError, match=r"lm_head\.weight differs from the embedding"):
        huggingface.load(reference.write_directory(tmp_path, TIED, tensors))


@pytest.mark.parametrize("kept", [0, 5, 300, 0.5, 0.999])
def test_a_truncated_file_is_refused(kept, tmp_path):
    source = changed_tensors(tmp_path, lambda tensors: None)
    path = source / huggingface.WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(InputError, match=r"model\.safetensors is not a whole safetensors file"):
        huggingface.load(source)


def test_pickles_are_never_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(reference.CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        huggingface.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "word"),
    [(None, "no config.json"), ("{", "not JSON"), ("[]", "not a JSON object"), ("\udcff", "JSON")],
)
def test_what_is_not_a_directory_of_a_model_is_refused(text, word, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=word) as error:
        huggingface.load(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(InputError):
        huggingface.load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"architectures": None, "model_type": "mistral"}, "expected Qwen2ForCausalLM"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.*linear"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"num_key_value_heads": 3}, r"config\.json.*kv_heads=3"),
        ({"hidden_size": "wide"}, "hidden_size"),
    ],
)
def test_models_of_another_kind_are_refused(settings, word, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(reference.CONFIG | settings))
    with pytest.raises(InputError, match=word):
        huggingface.read_config(tmp_path)


def test_a_missing_setting_is_named(tmp_path):
    config = {name: value for name, value in reference.CONFIG.items() if name != "hidden_size"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="hidden_size is missing"):
        huggingface.read_config(tmp_path)


def test_newer_names_of_settings_are_read(tmp_path):
    config = {name: value for name, value in reference.CONFIG.items() if name != "rope_theta"}
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert huggingface.read_config(tmp_path).rope_theta == 123.0


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "absent.safetensors"}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 5}},
        {"weight_map": ["model.safetensors"]},
        {},
        [],
    ],
)
def test_an_index_that_leads_astray_is_refused(index, tmp_path):
    source = tmp_path / "source"
    changed_tensors(source, lambda tensors: None)
    shutil.move(source / huggingface.WEIGHTS, tmp_path / huggingface.WEIGHTS)
    (source / huggingface.INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model\.safetensors\.index\.json"):
        huggingface.load(source)


def test_an_unknown_type_of_weights_is_refused(golden, tmp_path):
    like = reference.write_directory(
        tmp_path / "like", reference.PARSCALE | {"torch_dtype": "int3"}, {}
    )
    with pytest.raises(InputError, match="torch_dtype='int3'"):
        huggingface.save(golden, tmp_path / "new", like=like)
