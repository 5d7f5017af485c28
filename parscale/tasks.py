"""Tasks drawn at random, which small models learn in minutes: what they have in common."""

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.segments import Layout
from models.transformer import LanguageModel
from parscale.config import Config
from parscale.packing import Batch
from parscale.progress import Progress
from parscale.training import Training, TrainState, where
from sharding.mesh import make_mesh


class Trained(NamedTuple):
    """A finished run on one device.

    Attributes:
      training: what was fixed during it.
      state: its end.
      loss: of its last 100 batches, in nats per token that counts.
      seconds: it took, compilation included.
    """

    training: Training
    state: TrainState
    loss: float
    seconds: float

    def model(self) -> LanguageModel:
        """The model that it has made."""
        return self.training.model(self.state)


def train(
    config: Config,
    draw: Callable[[int, np.random.Generator], Batch],
    *,
    should_stop: Callable[[], bool] = lambda: False,
    log: TextIO | None = None,
) -> Trained | None:
    """Trains a model on one device.

    Args:
      config: the run; every random choice comes from `train.seed`.
      draw: gives the batch of a step, counted from 0.
      should_stop: asked after every step.
      log: where progress is shown; standard error by default.

    Returns:
      the run, or None if it was stopped.
    """
    begin = time.monotonic()
    steps = config.train.steps
    training = Training(config, make_mesh(config.mesh, jax.devices()[:1]))
    random = np.random.default_rng([config.train.seed, 0])
    state, pending, losses = training.init(), None, []
    with Progress(steps, every=config.train.log_every, file=log or sys.stderr) as progress:
        for step in range(1, steps + 2):
            if should_stop():
                return None
            # A loss is read one step late, so that the device never waits.
            done, pending = pending, None
            if step <= steps:
                batch = draw(step - 1, random)
                state, pending = training.step(state, batch)
            if done is not None:
                losses.append(float(done["loss"]))
                progress.update(step - 1, losses[-1], batch["ids"].size)
    seconds = time.monotonic() - begin
    return Trained(training, state, float(np.mean(losses[-100:])), seconds)


def lesson(largest: int, step: int, steps: int, random: np.random.Generator) -> int:
    """How large a task of memory a training batch has.

    The sizes are the powers of 2 up to the largest. They are taken up one after the other over the
    first half of the steps; every other batch is of the largest so far, the rest of any. From
    long texts alone attention does not begin to learn for a long time: it has to find the token
    before a value and to match keys, and neither helps without the other.

    Args:
      largest: a power of 2.
      step: steps done before.
      steps: of the whole run.
      random: where the choice comes from.
    """
    sizes = [1 << power for power in range(largest.bit_length())]
    sizes = sizes[: 1 + 2 * step * len(sizes) // steps]
    return sizes[-1] if random.random() < 0.5 else int(random.choice(sizes))


def accuracy(training: Training, state: TrainState, batches: Iterable[Batch]) -> float:
    """Share of the targets, where `mask` is 1, that are the model's first choice."""

    @jax.jit
    def right(trainable, frozen, batch):
        model = nnx.merge(training.graph, trainable, frozen)
        x, _ = model.run_streams(batch["ids"], **where(batch))
        chosen = jnp.argmax(model.logits(model.mix(x)), -1)
        return jnp.sum((chosen == batch["targets"]) * batch["mask"]), jnp.sum(batch["mask"])

    with jax.set_mesh(training.mesh):
        counts = [right(state.trainable, state.frozen, training.put(batch)) for batch in batches]
    found, asked = np.sum(counts, 0)
    return float(found / asked)


def to_batch(layouts: Sequence[Layout], asked: Sequence[np.ndarray], length: int) -> Batch:
    """Laid-out texts, one a row, as `Training` takes them.

    A token predicts the next of its own segment, so what begins a segment is nobody's target.

    Args:
      layouts: the texts.
      asked: for each text bool `[T]`, the tokens that are to be predicted.
      length: of the rows; shorter texts are padded.
    """
    most = max(len(layout.runs) for layout in layouts)
    row = lambda dtype, *axes: np.zeros((len(layouts), *axes, length), dtype)
    batch = {name: row(np.int32) for name in ("ids", "targets", "segment_ids", "positions")}
    batch |= {"mask": row(np.float32), "runs": row(np.int32, most, 2)}
    for number, (layout, wanted) in enumerate(zip(layouts, asked, strict=True)):
        T = len(layout.ids)
        batch["ids"][number, :T] = layout.ids
        batch["segment_ids"][number, :T] = 1
        batch["positions"][number, :T] = layout.positions
        batch["runs"][number, : len(layout.runs), :, :T] = layout.runs
        batch["targets"][number, : T - 1] = layout.ids[1:]
        same = layout.segments[1:] == layout.segments[:-1]
        batch["mask"][number, : T - 1] = wanted[1:] & same
    return batch
