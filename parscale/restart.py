"""Where a run begins: at its last complete checkpoint, at given weights, or at fresh ones."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from models.trees import Tree, overlay
from parscale import config_io, workdir
from parscale.checkpoints import Checkpoints, restore_params
from parscale.config import Config
from parscale.manifest import has_manifest
from parscale.stored_arrays import read_record
from parscale.training import Training, TrainState
from sharding.settings import InputError

COUNTERS = ("step", "skipped", "bad_streak")


@dataclasses.dataclass
class Record:
    """What a checkpoint keeps beside the arrays, for the run to go on as if never stopped.

    Attributes:
      corpus: SHA-256 of what the run reads.
      streams: of the arrays in this checkpoint.
      data: state of the batch iterator.
      tokens: targets learned from.
      seconds: of training, over all restarts.
      examples: SHA-256 chained over the row numbers of every batch consumed, in order.
    """

    corpus: str
    streams: int
    data: Any = None
    tokens: int = 0
    seconds: float = 0.0
    examples: str = ""

    def consume(self, rows: np.ndarray, tokens: int) -> None:
        """Counts a batch."""
        digest = hashlib.sha256(bytes.fromhex(self.examples))
        digest.update(np.asarray(rows, "<i8").tobytes())
        self.examples = digest.hexdigest()
        self.tokens += tokens


def saved_config(run: Path) -> Config | None:
    """The configuration of the run that was begun in a folder, if one was.

    Raises:
      InputError: there are checkpoints, and nothing that says of what.
    """
    path = run / workdir.CONFIG
    if path.exists():
        return config_io.from_json(Config, path)
    if has_checkpoint(run):
        raise InputError(
            f"{run} has {workdir.CHECKPOINTS}/ but no {workdir.CONFIG}, so what was trained there "
            "is not known: put it back, or give another --workdir"
        )
    return None


def has_checkpoint(run: Path) -> bool:
    """Whether a checkpoint was ever written to its end in a run's folder, damaged since or not."""
    return any(map(has_manifest, (run / workdir.CHECKPOINTS).glob("[0-9]*")))


def starting_params(config: Config, folder: Path, run: Path) -> Tree:
    """The weights that a run starts from, other than fresh ones; an empty dict if there are none.

    Frozen weights come from here at a restart, too: a run that trains streams alone does not
    repeat them in its checkpoints.
    """
    source, alone = config.train.init_from, config.train.trainable == "streams"
    if has_checkpoint(run):
        return restore_params(folder / workdir.BACKBONE)[1] if alone else {}
    if source:
        params = workdir.initial_params(source, config)
        if alone:
            workdir.keep_backbone(folder, workdir.backbone_of(params, config.model))
        return params
    if alone:
        raise InputError(
            "train.trainable=streams: give the backbone with --config.train.init_from="
            "<workdir or Hugging Face directory>"
        )
    return {}


def saved_items(state: TrainState, trainable: str) -> dict[str, Any]:
    """What of a state a checkpoint holds, by item; a frozen backbone is kept beside them once."""
    counters = {name: getattr(state, name) for name in COUNTERS}
    items = {"trainable": state.trainable, "optimizer": state.optimizer, "counters": counters}
    if state.frozen and trainable != "streams":
        items["frozen"] = state.frozen
    return items


def start(
    training: Training, checkpoints: Checkpoints, given: Tree, corpus: str
) -> tuple[TrainState, Record]:
    """The state of the last complete checkpoint, else the initial one; and its record.

    Args:
      training: the run.
      checkpoints: those of the run.
      given: what `starting_params` returned.
      corpus: SHA-256 of what the run reads.

    Raises:
      InputError: no checkpoint can be read or used, or the corpus is not the one it was.
    """
    streams = training.config.model.streams
    stored, restored = restore(training, checkpoints)
    if restored is None:
        return training.init(given), Record(corpus, streams)
    _, items, record = restored
    record = Record(**record)
    if record.corpus != corpus:
        raise InputError(
            f"corpus {training.config.data.corpus} has other contents than when this run began: "
            "put them back, or begin in another --workdir (--config.train.init_from takes these "
            "weights along)"
        )
    frozen = items.get("frozen", {})
    if training.config.train.trainable == "streams":
        frozen = training.init(given).frozen
    state = TrainState(
        trainable=items["trainable"],
        frozen=frozen,
        optimizer=items["optimizer"],
        **items["counters"],
    )
    if stored is not training:
        state = grow(training, state)
        record.streams = streams
    return state, record


def items_of(training: Training) -> dict[str, Any]:
    """What the checkpoints of a training hold, as shapes."""
    return saved_items(training.abstract, training.config.train.trainable)


def restore(
    training: Training, checkpoints: Checkpoints
) -> tuple[Training, tuple[int, dict[str, Any], dict] | None]:
    """The newest sound checkpoint, and the training that it fits: this, or one of fewer streams.

    How many streams a checkpoint has, it says itself: a run that grows has checkpoints of fewer
    until it saves again, and may go back to one later.
    """
    try:
        return training, checkpoints.restore(items_of(training))
    except InputError:
        step = checkpoints.latest_complete()
        record = {} if step is None else read_record(checkpoints.directory / str(step))
        model = training.config.model
        if not 1 <= record.get("streams", 0) < model.streams:
            raise
        model = dataclasses.replace(model, streams=record["streams"])
        config = dataclasses.replace(training.config, model=model)
        smaller = Training(config, without_stream_axis(training.mesh))
        return smaller, checkpoints.restore(items_of(smaller))


def without_stream_axis(mesh: Mesh) -> Mesh:
    """The same devices in the same order, with nothing divided over streams.

    The streams of a smaller model need not divide over the axis that is there for a larger one.
    """
    data, fsdp, stream, expert, *inner = mesh.devices.shape
    devices = mesh.devices.reshape(data, fsdp, 1, stream * expert, *inner)
    return Mesh(devices, mesh.axis_names, axis_types=mesh.axis_types)


def grow(training: Training, state: TrainState) -> TrainState:
    """`state` of fewer streams as one of `training`; the new streams' moments start from 0."""

    def by_path(tree: Any) -> Tree:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}

    def combine(fresh: TrainState, state: TrainState) -> TrainState:
        merged = overlay(by_path(fresh), by_path(state))
        return jax.tree.unflatten(jax.tree.structure(fresh), merged.values())

    shardings = jax.tree.map(lambda leaf: leaf.sharding, training.abstract)
    # Under jit, because no process may have all of an array.
    return jax.jit(combine, out_shardings=shardings)(training.init(), state)
