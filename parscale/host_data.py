"""What this host reads of a run's batches, and the held-out loss that all compute together."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int, Int64

from parscale import data
from parscale.packing import Batch, Rows
from parscale.training import Training, TrainState
from sharding import agreement, hosts
from sharding.settings import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class HostRows:
    """Rows of which a host reads its part of each batch, and is told the numbers of all.

    Attributes:
      rows: all.
      part: which of a batch are this host's, in order.
    """

    rows: Rows
    part: Int64[np.ndarray, "own"]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, rows: Int[np.ndarray, "B"]) -> Batch:
        """As `Rows.take`, with this host's rows alone in all arrays but `row` [B]."""
        rows = np.asarray(rows)
        return self.rows.take(rows[self.part]) | {"row": rows.astype(np.int32)}


def of_host(text: data.Data, mesh: Mesh, batch: int) -> data.Data:
    """`text` as this host reads it in batches of so many rows, over all hosts.

    Raises:
      InputError: the mesh divides the rows over hosts unevenly.
    """
    if not hosts.several():
        return text
    part = agreement.host_rows(mesh, batch)
    return dataclasses.replace(
        text, train=HostRows(text.train, part), held_out=HostRows(text.held_out, part)
    )


def train_batches(training: Training, text: data.Data) -> Any:
    """The run's batches as `data.train_batches` gives them: this host's rows, in the global order.

    Their `row` numbers the rows of all hosts, so that the record of them does not depend on hosts.
    """
    config = training.config.data
    return data.train_batches(of_host(text, training.mesh, config.batch), config)


def held_out(training: Training, text: data.Data) -> Iterator[Batch]:
    """The batches of an evaluation, whole, on one host."""
    config = training.config
    return data.held_out_batches(text, config.data.batch, config.train.eval_rows)


def held_out_loss(training: Training, text: data.Data, state: TrainState) -> float:
    """Mean loss over the held-out rows of the configuration, nats per token, on every host."""
    config = training.config
    total, tokens = 0.0, 0.0
    for batch in held_out(training, of_host(text, training.mesh, config.data.batch)):
        losses = agreement.gather(training.evaluate(state, batch))
        total += float(np.sum(losses, dtype=np.float64))
        mask = batch["mask"]
        if hosts.several():  # a row may be on several hosts, and must count once
            mask = agreement.gather(training.put(batch)["mask"])
        tokens += float(mask.sum())
    if not tokens:
        raise InputError(f"corpus {config.data.corpus}: no held-out token to predict")
    return total / tokens
