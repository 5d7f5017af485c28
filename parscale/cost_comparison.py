"""Streams against parameters: which of two ways to the same loss costs less in decoding."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from models.config import ModelConfig
from parscale.cost import Cost, parameter_counts
from sharding.settings import InputError


class Totals(NamedTuple):
    """Bytes and seconds of one cost or of a mean over several; or ratios of such."""

    memory: float
    latency: float


def mean_totals(costs: Sequence[Cost]) -> Totals:
    """Total bytes and seconds, means over several costs."""
    memory = sum(cost.memory.total for cost in costs)
    return Totals(memory / len(costs), sum(cost.latency for cost in costs) / len(costs))


def mixed_totals(
    shares: Sequence[tuple[float, ModelConfig]], cost: Callable[[ModelConfig], Totals]
) -> Totals:
    """The weighted mean of the costs of several models."""
    found = [(share, cost(model)) for share, model in shares]
    return Totals(
        sum(share * totals.memory for share, totals in found),
        sum(share * totals.latency for share, totals in found),
    )


def increase_ratios(
    model: ModelConfig,
    larger: Sequence[tuple[float, ModelConfig]],
    cost: Callable[[ModelConfig], Totals],
) -> Totals:
    """How many times as much memory and latency more parameters add to the plain model as streams.

    Above 1, streams are the cheaper way to the same loss.

    Args:
      model: a model with P > 1, compared with the same at P = 1.
      larger: plain models and their shares (that sum to 1) whose weighted mean reaches the loss of
        `model`; from `equal_loss`, or from measured losses.
      cost: of a model.
    """
    plain = cost(dataclasses.replace(model, streams=1))
    streams = cost(model)
    scaled = mixed_totals(larger, cost)
    return Totals(
        (scaled.memory - plain.memory) / (streams.memory - plain.memory),
        (scaled.latency - plain.latency) / (streams.latency - plain.latency),
    )


def equal_loss(model: ModelConfig, k: float = 0.3935) -> tuple[tuple[float, ModelConfig], ...]:
    """The plain model whose loss by the scaling law is that of `model`, between two real shapes.

    By L = (A / (N (k ln P + 1)))^alpha + E that is one with k ln P + 1 times the parameters. It is
    wider, with as many layers and heads, and F in proportion to D; since a head's width is even,
    it lies between two such models, in proportion to N.

    Args:
      model: P streams of a shape.
      k: of the law; by default the paper's for code (arXiv 2505.10475, figure 2).

    Returns:
      the two shapes with their shares, which sum to 1.

    Raises:
      InputError: k below 0.
    """
    if k < 0:
        raise InputError(f"k={k}: expected at least 0")
    wanted = parameter_counts(model)["non_embedding"] * (k * math.log(model.streams) + 1)
    count = lambda shape: parameter_counts(shape)["non_embedding"]

    def shape(head_dim: int) -> ModelConfig:
        hidden = round(model.mlp_width * head_dim / model.head_dim)
        return dataclasses.replace(model, streams=1, width=head_dim * model.heads, mlp_width=hidden)

    # N grows about as the square of the width: this guess is at most a few steps off.
    head_dim = int(model.head_dim * math.sqrt(wanted / count(shape(model.head_dim)))) // 2 * 2
    while count(shape(head_dim)) > wanted:
        head_dim -= 2
    while count(shape(head_dim + 2)) <= wanted:
        head_dim += 2
    low, high = shape(head_dim), shape(head_dim + 2)
    share = (wanted - count(low)) / (count(high) - count(low))
    return (1 - share, low), (share, high)
