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
from jax.sharding import Mesh

from models import huggingface
from models.config import ModelConfig
from models.growth import check_growable
from models.transformer import LanguageModel
from models.trees import merge, select
from models.weights import StreamParam, abstract_weights
from parscale import config_io, tokenizers
from parscale.checkpoints import Checkpoints, restore_params
from parscale.config import Config, DataConfig
from parscale.paths import check_folder
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

    def build(self, mesh: Mesh | None = None) -> LanguageModel:
        """The model on a mesh; None: on the default device.

        Raises:
          InputError: an array does not divide over the mesh.
        """
        abstract = nnx.eval_shape(lambda: LanguageModel(self.model, rngs=nnx.Rngs(0)))
        if mesh is None:
            params = jax.tree.map(jax.numpy.asarray, self.params)
        else:
            places = abstract_weights(nnx.state(abstract), mesh)
            params = jax.tree.map(
                lambda array, place: jax.device_put(array, place.sharding), self.params, places
            )
        return nnx.merge(nnx.graphdef(abstract), params)


def run_folder(workdir: str | Path, config: Config) -> Path:
    """Where the run of `config` keeps its files.

    Raises:
      InputError: nothing can be written there, or the workdir already has a run with so many
        streams in the other place, so that a number would no longer choose between them.
    """
    check_folder(workdir)
    own, alone = Path(workdir), Path(workdir) / STREAMS / str(config.model.streams)
    if config.train.trainable == "streams":
        run, other = alone, own
    else:
        run, other = own, alone
    if is_run(other):
        streams = config_io.from_json(Config, other / CONFIG).model.streams
        if streams == config.model.streams:
            raise InputError(
                f"{other} already holds a run with {streams} streams, of another "
                "train.trainable: give another --workdir"
            )
    return run


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run of ours."""
    return (folder / CONFIG).exists() and (folder / CHECKPOINTS).exists()


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
            raise InputError(
                f"--streams={streams}: {source} has {model.streams}, and keeps no other number"
            )
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
    """Whether a folder is a Hugging Face directory rather than a workdir of ours.

    A run that ended before its first checkpoint has left only a configuration, with a section
    `train` that Hugging Face's do not have.
    """
    if is_run(folder) or not (folder / CONFIG).exists():
        return False
    return "train" not in huggingface.read_json(folder)


def kept_runs(workdir: Path) -> dict[int, Path]:
    """The folder of each run in a workdir, by its number of streams."""
    folders = filter(is_run, (workdir, *(workdir / STREAMS).glob("*")))
    return {config_io.from_json(Config, path / CONFIG).model.streams: path for path in folders}


def choose_run(workdir: Path, streams: int | None) -> Path:
    """The folder of the run in `workdir` with so many streams. Raises InputError if none has."""
    runs = kept_runs(workdir)
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
        raise InputError(
            f"--streams={streams}: {workdir} has no run with {streams} streams, only with {numbers}"
        )
    return runs[streams]


def initial_params(source: str, config: Config) -> dict[str, Any]:
    """Weights of `source` (workdir or Hugging Face directory) for the start of a run of `config`.

    Of a workdir that keeps streams besides a run of its own, that run is taken.

    Raises:
      InputError: the weights cannot be read, or are of another shape of model or tokenizer.
    """
    path = Path(source)
    try:
        own = config_io.from_json(Config, path / CONFIG).model.streams if is_run(path) else None
        weights = load_weights(source, own)
        check_growable(weights.model, config.model)
        check_tokenizer(weights.data.tokenizer, config.data.tokenizer)
    except InputError as error:
        raise InputError(f"train.init_from={source}: {error}") from None
    return weights.params


def check_tokenizer(theirs: str, ours: str) -> None:
    """Raises InputError if weights that know the ids of one tokenizer are to read another's.

    Weights without a tokenizer of their own ("bytes") say nothing: their vocabulary may have come
    from anywhere, and is checked against the tokenizer's wherever text is read.
    """
    if theirs in ("bytes", ours):
        return
    if tokenizers.load(theirs).fingerprint != tokenizers.load(ours).fingerprint:
        raise InputError(
            f"the weights speak tokenizer {theirs}, but data.tokenizer={ours}: "
            f"give --config.data.tokenizer={theirs}"
        )


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
    same = jax.tree.structure(kept) == jax.tree.structure(backbone) and all(
        jax.tree.leaves(jax.tree.map(np.array_equal, kept, backbone))
    )
    if not same:
        raise InputError(
            f"{workdir} keeps streams of another backbone than train.init_from names: "
            "give that one, or another --workdir"
        )
