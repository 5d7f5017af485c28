"""Where runs lie in a workdir, and how the right weights are found there."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from models import huggingface
from models.config import ModelConfig
from models.transformer import LanguageModel
from models.weights import StreamParam
from parscale import config_io, workdir
from parscale.checkpoints import Checkpoints
from parscale.config import Config, TrainConfig
from sharding.settings import InputError

GOLDEN = Path(__file__).parent.parent / "data" / "parscale_p2"
MODEL = ModelConfig(
    vocab_size=20, width=16, layers=1, heads=2, kv_heads=1, mlp_width=24, transform_size=3
)


@functools.cache
def random_params(model: ModelConfig, seed: int) -> dict:
    abstract = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32),
        nnx.to_pure_dict(nnx.state(abstract)),
    )


def stream_params(model: ModelConfig, seed: int) -> dict:
    abstract = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    streams = nnx.to_pure_dict(nnx.state(abstract, StreamParam))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), streams)


def write_run(folder: Path, config: Config, step: int, trainable: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config_io.to_json(config, folder / workdir.CONFIG)
    with Checkpoints(folder / workdir.CHECKPOINTS, keep=1) as checkpoints:
        checkpoints.save(step, {"trainable": trainable}, {}, wait=True)


def same(first: dict, second: dict) -> bool:
    equal = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), first, second)
    return all(jax.tree.leaves(equal))


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """One backbone with streams for P = 2 and P = 4."""
    folder = tmp_path_factory.mktemp("shared")
    workdir.keep_backbone(folder, random_params(MODEL, 0))
    for streams in (2, 4):
        model = dataclasses.replace(MODEL, streams=streams)
        config = Config(model=model, train=TrainConfig(trainable="streams", loss_chunk=7))
        run = workdir.run_folder(folder, config)
        assert run == folder / "streams" / str(streams)
        write_run(run, config, 10 * streams, stream_params(model, streams))
    return folder


def test_a_run_of_its_own(tmp_path):
    config = Config(model=dataclasses.replace(MODEL, streams=2))
    assert workdir.run_folder(tmp_path, config) == tmp_path
    params = random_params(config.model, 3)
    write_run(tmp_path, config, 42, params)
    for streams in (None, 2):
        weights = workdir.load_weights(tmp_path, streams)
        assert (weights.model, weights.step, weights.data) == (config.model, 42, config.data)
        assert same(weights.params, params)
    with pytest.raises(InputError, match="no run with 3 streams, only with 2"):
        workdir.load_weights(tmp_path, 3)
    model = weights.build()
    np.testing.assert_array_equal(model.embedding[...], params["embedding"])
    assert same(workdir.initial_params(str(tmp_path), config), params)


def test_one_backbone_serves_several_numbers_of_streams(shared):
    for streams in (2, 4):
        weights = workdir.load_weights(shared, streams)
        assert weights.model.streams == streams
        assert (weights.step, weights.loss_chunk) == (10 * streams, 7)
        assert same(workdir.backbone_of(weights.params, weights.model), random_params(MODEL, 0))
        own = stream_params(weights.model, streams)
        assert same({n: weights.params[n] for n in ("aggregation",)}, {
            "aggregation": own["aggregation"]
        })  # fmt: skip
        prefixes = weights.params["layers"]["mixer"]["streams"]
        assert same(prefixes, own["layers"]["mixer"]["streams"])
        weights.build()
    with pytest.raises(InputError, match=r"several numbers of streams \(2, 4\).*--streams"):
        workdir.load_weights(shared)
    with pytest.raises(InputError, match="no run with 8 streams, only with 2, 4"):
        workdir.load_weights(shared, 8)


def test_streams_of_another_backbone_are_refused(shared):
    workdir.keep_backbone(shared, random_params(MODEL, 0))
    other = random_params(MODEL, 1)
    wider = random_params(dataclasses.replace(MODEL, mlp_width=32), 0)
    unbiased = random_params(dataclasses.replace(MODEL, qkv_bias=False), 0)
    for backbone in (other, wider, unbiased):
        with pytest.raises(InputError, match="another backbone"):
            workdir.keep_backbone(shared, backbone)


def test_a_run_starts_from_weights_of_its_shape_alone(tmp_path):
    plain = tmp_path / "plain"
    write_run(plain, Config(model=MODEL), 1, random_params(MODEL, 0))
    start = workdir.initial_params(str(plain), Config(model=dataclasses.replace(MODEL, streams=4)))
    assert same(start, random_params(MODEL, 0))
    with pytest.raises(InputError) as error:
        workdir.initial_params(str(plain), Config(model=dataclasses.replace(MODEL, mlp_width=32)))
    for word in (f"train.init_from={plain}", "mlp_width=24", "--config.model.mlp_width=24"):
        assert word in str(error.value)


def test_a_hugging_face_directory_is_read_as_well():
    weights = workdir.load_weights(GOLDEN)
    assert weights.model == huggingface.read_config(GOLDEN)
    assert weights.data.tokenizer == "bytes"
    assert workdir.load_weights(GOLDEN, 2).model.streams == 2
    with pytest.raises(InputError, match=r"--streams=4.*parscale_p2 has 2"):
        workdir.load_weights(GOLDEN, 4)


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        workdir.load_weights(tmp_path / "nowhere")
    with pytest.raises(InputError, match="no run there"):
        workdir.load_weights(tmp_path)
    # A run that ended before its first checkpoint is no Hugging Face directory.
    config_io.to_json(Config(model=MODEL), tmp_path / workdir.CONFIG)
    with pytest.raises(InputError, match="no run there"):
        workdir.load_weights(tmp_path)
