"""The training state and the compiled step: loss, gradient, AdamW, on any mesh."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from models.growth import begin_from
from models.transformer import LanguageModel
from models.trees import merge, select
from models.weights import StreamParam, TransformParam, abstract_weights, map_weights
from pallas_kernels.masks import Mask
from parscale.config import Config
from parscale.loss import token_losses
from parscale.optimizer import learning_rate, make_optimizer
from sharding import rules, sequence
from sharding.mesh import make_mesh
from sharding.pods.compilation import compiler_options

LEARNS = {
    "all": nnx.Param,
    "streams": StreamParam,
    "all_but_transform": nnx.All(nnx.Param, nnx.Not(TransformParam)),
}
"""For each `train.trainable`, the weights that learn."""

BATCH = {
    "ids": jnp.int32, "targets": jnp.int32, "segment_ids": jnp.int32, "positions": jnp.int32,
    "mask": jnp.float32,
}  # fmt: skip
"""The arrays `[B, T]` of a batch that the step reads."""

FORKS = ("runs", "branches")
"""And those that it reads where texts fork and join (`models.segments`), if they are there."""

Batch = dict[str, Array]
Params = dict[str, Any]


def where(batch: Batch) -> dict[str, Any]:
    """Of a batch what a model is told besides token ids: positions, and who sees whom."""
    runs = batch.get("runs")
    return {
        "positions": batch["positions"],
        "segment_ids": batch["segment_ids"],
        "mask": None if runs is None else Mask(runs, causal=True, queries=runs.shape[-1]),
        "branches": batch.get("branches"),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All arrays of a run.

    Attributes:
      step: int32 [], optimizer steps dispatched, the skipped ones among them.
      trainable: parameters that learn, float32.
      frozen: parameters that do not (empty where all learn), float32.
      optimizer: optax's state, for `trainable` alone.
      skipped: int32 [], steps left out because the loss or a gradient was not finite.
      bad_streak: int32 [], how many of them in a row just now.
    """

    step: Int[Array, ""]
    trainable: Params
    frozen: Params
    optimizer: Any
    skipped: Int[Array, ""]
    bad_streak: Int[Array, ""]

    def params(self) -> Params:
        """Trainable and frozen parameters in one tree."""
        return merge(self.trainable, self.frozen)


class Training:
    """What is fixed during a run: model structure, optimizer, mesh; and its compiled functions.

    Args:
      config: the run.
      mesh: by default the one `config.mesh` describes, over all devices.

    Raises:
      InputError: the mesh does not fit the devices, or an array does not divide over it.
    """

    def __init__(self, config: Config, mesh: Mesh | None = None):
        self.config = config
        self.mesh = make_mesh(config.mesh) if mesh is None else mesh
        abstract = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
        self._learns = LEARNS[config.train.trainable]
        self.graph, trainable, frozen = nnx.split(abstract, self._learns, ...)
        self.optimizer = make_optimizer(
            config.train, map_weights(lambda weight: weight.decay, trainable)
        )
        self.abstract = self._abstract_state(trainable, frozen)
        """A TrainState of `jax.ShapeDtypeStruct` with shardings, as checkpoints restore it."""
        self._check_batch()
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self._init = jax.jit(self._init_state, out_shardings=shardings)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        self._step = jax.jit(
            self._train_step,
            donate_argnums=0,
            out_shardings=(shardings, replicated),
            compiler_options=compiler_options(self.mesh),
        )
        self._evaluate = jax.jit(self._held_out_losses)

    def init(self, params: Params | None = None) -> TrainState:
        """The state at step 0, with weights from `train.seed`, or with `params` where given.

        Args:
          params: nested dict of arrays; what it lacks (new streams) is drawn from the seed.
        """
        with jax.set_mesh(self.mesh):
            return self._init(self.config.train.seed, params or {})

    def step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        """One optimizer step; `state` is donated.

        Args:
          state: where the run stands.
          batch: arrays `[B, T]`: int32 `ids`, `targets`, `segment_ids`, `positions`, and float32
            `mask`, the weight of each target. Of texts that fork and join also int32 `runs`
            `[B, R, 2, T]`, up to the causal order who sees each token (`masks.Mask`), in place of
            `segment_ids`; and, if the model marks branches, `branches` `[B, T]`.

        Returns:
          the new state and metrics (`loss` in nats per token, `grad_norm`, `learning_rate`,
          `tokens`, `skipped`, `bad_streak`), all still being computed.
        """
        with jax.set_mesh(self.mesh):
            return self._step(state, self.put(batch))

    def lower(self) -> jax.stages.Lowered:
        """The step, traced for a state and a batch that need not be there, ready to compile."""
        with jax.set_mesh(self.mesh):
            return self._step.lower(self.abstract, self._abstract_batch())

    def evaluate(self, state: TrainState, batch: Batch) -> Float[Array, "B T"]:
        """Cross-entropy of every token of a batch in nats, 0 where `mask` is 0."""
        with jax.set_mesh(self.mesh):
            return self._evaluate(state.trainable, state.frozen, self.put(batch))

    def model(self, state: TrainState) -> LanguageModel:
        """The model with the weights of `state`."""
        return nnx.merge(self.graph, state.trainable, state.frozen)

    def put(self, batch: Batch) -> Batch:
        """The arrays of a host's batch that the step reads, on the mesh."""
        sharding = rules.named_sharding(self.mesh, "batch", None)
        names = [*BATCH, *(name for name in FORKS if name in batch)]
        return {
            name: jax.make_array_from_process_local_data(sharding, batch[name]) for name in names
        }

    def _check_batch(self) -> None:
        data, train = self.config.data, self.config.train
        sizes = {
            "data.batch over train.accumulate": (data.batch // train.accumulate, "batch"),
            "model.streams": (self.config.model.streams, "streams"),
            "data.length": (data.length, "length"),
        }
        for name, (size, axis) in sizes.items():
            rules.check_divisible(name, (size,), (axis,), self.mesh)

        if self.mesh.shape[sequence.AXIS] > 1:
            # The schemes of the sequence axis refuse sizes when traced: better now than after the
            # weights are made.
            with jax.set_mesh(self.mesh):
                state = (self.abstract.trainable, self.abstract.frozen)
                jax.eval_shape(self._losses, *state, self._abstract_batch())

    def _abstract_batch(self) -> Batch:
        shape = (self.config.data.batch, self.config.data.length)
        sharding = rules.named_sharding(self.mesh, "batch", None)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            for name, dtype in BATCH.items()
        }

    def _abstract_state(self, trainable: nnx.State, frozen: nnx.State) -> TrainState:
        trainable = abstract_weights(trainable, self.mesh)
        frozen = abstract_weights(frozen, self.mesh)
        replicated = NamedSharding(self.mesh, PartitionSpec())
        count = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
        optimizer = optax.tree.map_params(
            self.optimizer,
            lambda moment, param: jax.ShapeDtypeStruct(
                moment.shape, moment.dtype, sharding=param.sharding
            ),
            jax.eval_shape(self.optimizer.init, trainable),
            trainable,
            transform_non_params=lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=replicated
            ),
        )
        return TrainState(
            step=count,
            trainable=trainable,
            frozen=frozen,
            optimizer=optimizer,
            skipped=count,
            bad_streak=count,
        )

    def _init_state(self, seed: Int[Array, ""], given: Params) -> TrainState:
        params = begin_from(self.config.model, jax.random.key(seed), given)
        trainable, frozen = (
            select(params, part) for part in (self.abstract.trainable, self.abstract.frozen)
        )
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            trainable=trainable,
            frozen=frozen,
            optimizer=self.optimizer.init(trainable),
            skipped=zero,
            bad_streak=zero,
        )

    def _losses(self, trainable: Params, frozen: Params, batch: Batch) -> Float[Array, "B T"]:
        model = nnx.merge(self.graph, trainable, frozen)
        mesh = self.config.mesh
        with sequence.using(mesh.sequence_attention, mesh.sequence_state):
            x, _ = model.run_streams(batch["ids"], **where(batch))
        with jax.named_scope("loss"):
            losses = token_losses(
                model.mix(x), model.head_weight(), batch["targets"], self.config.train.loss_chunk
            )
        return losses * batch["mask"]

    def _held_out_losses(self, trainable, frozen, batch):
        return self._losses(trainable, frozen, batch)

    def _gradient(self, state: TrainState, batch: Batch) -> tuple[Array, Params]:
        """Mean loss of the batch and its gradient, computed in `train.accumulate` parts."""
        tokens = jnp.maximum(jnp.sum(batch["mask"]), 1.0)

        def part_loss(trainable, part):
            return jnp.sum(self._losses(trainable, state.frozen, part)) / tokens

        loss_and_gradient = jax.value_and_grad(part_loss)
        parts = self.config.train.accumulate
        if parts == 1:
            return loss_and_gradient(state.trainable, batch)

        def split(array):
            # Row i goes to part i % parts, so that every device keeps the rows it has.
            return jnp.moveaxis(array.reshape(-1, parts, *array.shape[1:]), 1, 0)

        def add(total, part):
            return jax.tree.map(jnp.add, total, loss_and_gradient(state.trainable, part)), None

        zero = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), state.trainable))
        total, _ = jax.lax.scan(add, zero, jax.tree.map(split, batch))
        return total

    def _train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        loss, gradient = self._gradient(state, batch)
        norm = optax.tree.norm(gradient)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        with jax.named_scope("optimizer"):
            updates, optimizer = self.optimizer.update(gradient, state.optimizer, state.trainable)
            trainable = optax.apply_updates(state.trainable, updates)
            keep = functools.partial(jnp.where, good)
            trainable, optimizer = jax.tree.map(
                keep, (trainable, optimizer), (state.trainable, state.optimizer)
            )
        bad = 1 - good.astype(jnp.int32)
        new = TrainState(
            step=state.step + 1,
            trainable=trainable,
            frozen=state.frozen,
            optimizer=optimizer,
            skipped=state.skipped + bad,
            bad_streak=jnp.where(good, 0, state.bad_streak + 1),
        )
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": learning_rate(self.config.train)(state.step - state.skipped),
            "tokens": jnp.sum(batch["mask"]),
            "skipped": new.skipped,
            "bad_streak": new.bad_streak,
        }
        return new, metrics
