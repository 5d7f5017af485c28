"""What lies where in a run's folder, and how weights are read from one.

A run that trains everything keeps its `config.json`, `checkpoints/`, `metrics.csv`, `result.json`
in the workdir itself. Runs that train streams alone on one frozen backbone share a workdir:
`backbone/` holds the frozen weights once, and `streams/<P>/` the run of each number of streams.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from models import huggingface
from models.config import ModelConfig
from models.growth import check_growable
from models.transformer import LanguageModel
from models.trees import merge, select
from models.weights import StreamParam
from parscale import config_io
from parscale.checkpoints import Checkpoints, restore_params
from parscale.config import Config, DataConfig
from sharding.settings import InputError

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
BACKBONE = "backbone"
STREAMS = "streams"
RESULT = "result.json"
ORIGIN = "huggingface"
"""Folder with the settings and tokenizer of the Hugging Face directory a model came from."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """A model's weights, read from somewhere.

    Attributes:
      model: its shape.
      params: nested dict of NumPy arrays.
      data: what its training read, and so which tokenizer it speaks.
      step: optimizer steps behind it.
      loss_chunk: positions whose logits its training held at once.
    """

    model: ModelConfig
    params: dict[str, Any]
    data: DataConfig
    step: int = 0
    loss_chunk: int = 256

    def build(self) -> LanguageModel:
        """The model on the default device."""
        graph = nnx.graphdef(nnx.eval_shape(lambda: LanguageModel(self.model, rngs=nnx.Rngs(0))))
        return nnx.merge(graph, jax.tree.map(jax.numpy.asarray, self.params))


def run_folder(workdir: str | Path, config: Config) -> Path:
    """Where the run of `config` keeps its files."""
    if config.train.trainable == "streams":
        return Path(workdir) / STREAMS / str(config.model.streams)
    return Path(workdir)


def load_weights(source: str | Path, streams: int | None = None) -> Weights:
    """The weights in a workdir of ours or a Hugging Face directory.

    Args:
      source: the folder.
      streams: which number of streams, where a workdir keeps several; None: the only one.

    Raises:
      InputError: neither kind of folder, no such number of streams, or damaged contents.
    """
    source = Path(source)
    if not source.is_dir():
        raise InputError(f"{source}: no such folder; expected a workdir or Hugging Face directory")
    if is_huggingface(source):
        model = huggingface.read_config(source)
        if streams not in (None, model.streams):
            raise InputError(f"{source} has {model.streams} streams, not {streams}")
        tokenizer = source / "tokenizer.json"
        data = DataConfig(tokenizer=str(tokenizer) if tokenizer.exists() else "bytes")
        return Weights(model, huggingface.load_params(source, model), data)
    folder = choose_run(source, streams)
    config = config_io.from_json(Config, folder / CONFIG)
    step, params, _ = restore_params(folder / CHECKPOINTS)
    if config.train.trainable == "streams":
        _, backbone, _ = restore_params(source / BACKBONE)
        params = merge(params, backbone)
    return Weights(config.model, params, config.data, step, config.train.loss_chunk)


def is_huggingface(folder: Path) -> bool:
    """Whether a folder is a Hugging Face directory rather than a workdir of ours."""
    return (folder / CONFIG).exists() and not (folder / CHECKPOINTS).exists()


def choose_run(workdir: Path, streams: int | None) -> Path:
    """The folder of the run in `workdir` with so many streams. Raises InputError if none has."""
    runs = {}
    for folder in (workdir, *(workdir / STREAMS).glob("*")):
        if (folder / CONFIG).exists() and (folder / CHECKPOINTS).exists():
            runs[config_io.from_json(Config, folder / CONFIG).model.streams] = folder
    if not runs:
        raise InputError(f"{workdir}: no run there (no {CONFIG} with {CHECKPOINTS}/)")
    numbers = ", ".join(map(str, sorted(runs)))
    if streams is None:
        if len(runs) > 1:
            raise InputError(
                f"{workdir} keeps several numbers of streams ({numbers}): choose one with --streams"
            )
        return next(iter(runs.values()))
    if streams not in runs:
        raise InputError(f"{workdir} has no run with {streams} streams, only with {numbers}")
    return runs[streams]


def initial_params(source: str, model: ModelConfig) -> dict[str, Any]:
    """Weights of `source` (workdir or Hugging Face directory) for the start of a run of `model`.

    Of a workdir that keeps streams besides a run of its own, that run is taken.

    Raises:
      InputError: the weights are of another shape of model.
    """
    path = Path(source)
    own = (path / CONFIG).exists() and (path / CHECKPOINTS).exists()
    streams = config_io.from_json(Config, path / CONFIG).model.streams if own else None
    weights = load_weights(source, streams)
    try:
        check_growable(weights.model, model)
    except InputError as error:
        raise InputError(f"train.init_from={source}: {error}") from None
    return weights.params


def backbone_of(params: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """The part of `params` that does not belong to the streams."""
    abstract = nnx.eval_shape(lambda: LanguageModel(model, rngs=nnx.Rngs(0)))
    rest = nnx.to_pure_dict(nnx.split_state(nnx.state(abstract), StreamParam, ...)[1])
    return select(params, rest)


def keep_backbone(workdir: str | Path, backbone: dict[str, Any]) -> None:
    """Writes the frozen weights of a workdir, or checks that those there are the same.

    Raises:
      InputError: the workdir belongs to another backbone.
    """
    folder = Path(workdir) / BACKBONE
    with Checkpoints(folder, keep=1) as checkpoints:
        if checkpoints.latest_complete() is None:
            checkpoints.save(0, {"frozen": backbone}, {}, wait=True)
            return
    _, kept, _ = restore_params(folder)
    same = jax.tree.map(lambda a, b: a.shape == b.shape and np.array_equal(a, b), kept, backbone)
    if not all(jax.tree.leaves(same)):
        raise InputError(
            f"{workdir} keeps streams of another backbone than train.init_from names: "
            "give that one, or another --workdir"
        )
