"""Held-out loss, and what the streams do: each alone, their weights, how far they agree."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float

from models.transformer import LanguageModel
from parscale.loss import perplexity, token_losses
from sharding import rules

COLLAPSED = 0.99
"""Mean pairwise agreement above which the streams count as one."""


@dataclasses.dataclass(frozen=True)
class StreamReport:
    """What the streams of a model do on some text.

    Attributes:
      loss: of the mixture, nats per token.
      tokens: targets that were counted.
      stream_losses: `[P]`, of each stream's own output through the LM head.
      weights: `[P]`, mean aggregation weight of each stream.
      weight_entropy: mean entropy of a token's weights, nats; log P if they are all equal.
      agreement: `[P, P]`, share of tokens for which two streams predict the same token.
    """

    loss: float
    tokens: int
    stream_losses: np.ndarray
    weights: np.ndarray
    weight_entropy: float
    agreement: np.ndarray

    @property
    def streams(self) -> int:
        """P."""
        return len(self.stream_losses)

    @property
    def gain(self) -> float:
        """Loss of the best single stream less that of the mixture, nats per token."""
        return float(self.stream_losses.min()) - self.loss

    @property
    def mean_agreement(self) -> float:
        """Mean over the pairs of different streams; 1 if there is only one stream."""
        pairs = self.agreement[~np.eye(self.streams, dtype=bool)]
        return float(pairs.mean()) if pairs.size else 1.0

    @property
    def collapsed(self) -> bool:
        """Whether the streams do the same: P times the compute of one, for nothing."""
        return self.streams > 1 and self.mean_agreement > COLLAPSED


def report(
    model: LanguageModel,
    batches: Iterable[dict[str, Array]],
    chunk: int,
    mesh: Mesh | None = None,
) -> StreamReport:
    """Runs a model over held-out batches.

    Args:
      model: any P.
      batches: arrays `[B, T]` as `training.Training.step` reads them.
      chunk: positions whose logits exist at once.
      mesh: that of the model's weights; None: they are on one device.

    Raises:
      InputError: rows or positions of a batch do not divide over the mesh.
      ValueError: no target is counted in any batch.
    """
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    total = None
    names = ("ids", "targets", "segment_ids", "positions", "mask")
    for batch in batches:
        arrays = {name: batch[name] for name in names}
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            if mesh is not None:
                rules.check_divisible("a batch", batch["ids"].shape, ("batch", "length"), mesh)
                arrays = jax.device_put(arrays, rules.named_sharding(mesh, "batch", None))
            sums = _batch_sums(graph, params, arrays, chunk)
        # Fetching at once keeps a single step in flight (fake CPU devices hang on more).
        sums = jax.tree.map(lambda array: np.asarray(array, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
    if total is None or total["tokens"] == 0:
        raise ValueError("no token to evaluate")
    tokens = total.pop("tokens")
    means = {name: value / tokens for name, value in total.items()}
    return StreamReport(
        loss=float(means["loss"]),
        tokens=int(tokens),
        stream_losses=means["stream_losses"],
        weights=means["weights"],
        weight_entropy=float(means["entropy"]),
        agreement=means["agreement"],
    )


@functools.partial(jax.jit, static_argnames=("graph", "chunk"))
def _batch_sums(
    graph: nnx.GraphDef, params: Any, batch: dict[str, Array], chunk: int
) -> dict[str, Array]:
    """Sums over the counted tokens of a batch, of each figure of the report."""
    model = nnx.merge(graph, params)
    mask, targets, head = batch["mask"], batch["targets"], model.head_weight()
    x, _ = model.run_streams(
        batch["ids"], positions=batch["positions"], segment_ids=batch["segment_ids"]
    )
    streams = x.shape[1]
    losses = [token_losses(x[:, p], head, targets, chunk) for p in range(streams)]
    predictions = [predict(x[:, p], head, chunk) for p in range(streams)]
    agreement = [
        [jnp.sum((first == second) * mask) for second in predictions] for first in predictions
    ]
    if streams > 1:
        weights = model.aggregation.weights(x)
        loss = token_losses(model.mix(x), head, targets, chunk)
    else:
        weights = jnp.ones((*mask.shape, 1), jnp.float32)
        loss = losses[0]
    entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(weights), 0.0), -1)
    return {
        "tokens": jnp.sum(mask),
        "loss": jnp.sum(loss * mask),
        "stream_losses": jnp.stack([jnp.sum(part * mask) for part in losses]),
        "weights": jnp.einsum("btp,bt->p", weights, mask),
        "entropy": jnp.sum(entropy * mask),
        "agreement": jnp.array(agreement),
    }


def predict(x: Float[Array, "B T D"], head: Float[Array, "D V"], chunk: int) -> Float[Array, "B T"]:
    """The most likely next token at each position, `chunk` positions at a time."""
    parts = [
        jnp.argmax(x[:, start : start + chunk] @ head.astype(x.dtype), -1)
        for start in range(0, x.shape[1], chunk)
    ]
    return jnp.concatenate(parts, 1)


def describe(result: StreamReport, bits_per_byte: float) -> str:
    """The report as a person reads it, one fact a line."""
    lines = [
        f"tokens          {result.tokens}",
        f"loss            {result.loss:.4f} nats per token",
        f"perplexity      {perplexity(result.loss):.3f}",
        f"bits per byte   {bits_per_byte:.4f}",
    ]
    if result.streams == 1:
        return "\n".join(lines)
    most = math.log(result.streams)
    lines += ["", "stream   loss alone   mean weight   agrees with each stream"]
    for p in range(result.streams):
        agrees = " ".join(f"{share:6.3f}" for share in result.agreement[p])
        lines.append(
            f"{p:6d}   {result.stream_losses[p]:10.4f}   {result.weights[p]:11.4f}   {agrees}"
        )
    lines += [
        "",
        f"entropy of the weights     {result.weight_entropy:.4f} nats (equal weights: {most:.4f})",
        f"mean pairwise agreement    {result.mean_agreement:.4f}",
        f"gain over the best stream  {result.gain:+.4f} nats per token",
    ]
    if result.collapsed:
        lines += [
            "",
            f"WARNING: the {result.streams} streams have collapsed into one: they predict the same "
            f"token {result.mean_agreement:.1%} of the time, so {result.streams} streams cost "
            f"{result.streams} times the compute of one and give nothing more.",
        ]
    return "\n".join(lines)
