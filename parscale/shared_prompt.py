"""What it costs in loss that the first stream alone reads a prompt (`layouts.shared_prompt`)."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from models.block_cache import View, with_states
from models.config import check_forks
from models.growth import first_stream
from models.transformer import LanguageModel
from parscale.engine import SLOTS
from parscale.loss import token_losses
from sharding.settings import InputError


class Losses(NamedTuple):
    """Of the text after a prompt, nats per token.

    Attributes:
      exact: every stream has read the prompt.
      shared: the first has, and the others see its keys and values.
      tokens: that were counted.
    """

    exact: float
    shared: float
    tokens: int


def compare(
    model: LanguageModel, batches: Iterable[dict[str, Array]], prompt: int, chunk: int
) -> Losses:
    """Losses of a model over held-out batches, the first tokens of each row being its prompt.

    Args:
      model: of attention alone, with several streams.
      batches: arrays `[B, T]` as for `evaluation.report`; rows of more than one document are left
        out.
      prompt: tokens of a prompt.
      chunk: positions whose logits exist at once.

    Raises:
      InputError: a model of one stream, of other mixers or with soft tokens; a prompt without a
        token, or of a whole row; or no row is one document.
    """
    check_forks(model.config)
    if model.config.streams == 1:
        raise InputError("streams=1: there is no other stream to share a prompt with")
    first_stream(model)  # raises where it cannot be
    graph, params = nnx.split(model)
    params, sums = nnx.to_pure_dict(params), np.zeros(3)
    for batch in batches:
        length = batch["ids"].shape[1]
        if not 0 < prompt < length:
            raise InputError(
                f"shared_prompt={prompt}: expected 1 to {length - 1}, less than the {length} "
                "tokens of a row"
            )
        whole = np.all(np.asarray(batch["segment_ids"]) == 1, 1)
        counted = np.asarray(batch["mask"]) * whole[:, None]
        sums += np.asarray(
            _sums(graph, params, batch["ids"], batch["targets"], counted, prompt, chunk), np.float64
        )
    exact, shared, tokens = sums
    if not tokens:
        raise InputError("no row is of one document: shared prompts need longer ones")
    return Losses(exact / tokens, shared / tokens, int(tokens))


@functools.partial(jax.jit, static_argnames=("graph", "prompt", "chunk"))
def _sums(
    graph: nnx.GraphDef,
    params: Any,
    ids: Array,
    targets: Array,
    counted: Array,
    prompt: int,
    chunk: int,
) -> Float[Array, "3"]:
    """The sums of both losses over what is counted of a batch, and its number."""
    model = nnx.merge(graph, params)
    rows, length = ids.shape
    counted = counted[:, prompt:]

    def loss(x):
        losses = token_losses(model.mix(x), model.head_weight(), targets[:, prompt:], chunk)
        return jnp.sum(losses * counted)

    exact = loss(model.run_streams(ids)[0][:, :, prompt:])
    held = -(-prompt // SLOTS)
    blocks = 1 + jnp.arange(rows * held, dtype=jnp.int32).reshape(rows, 1, held)
    place = jnp.arange(prompt)
    places = blocks[..., place // SLOTS] * SLOTS + (place % SLOTS).astype(jnp.int32)
    cache = with_states(model.init_blocks(1 + rows * held, SLOTS), model.init_states(rows))
    nothing = jnp.zeros((rows, 1, 0), jnp.int32)
    _, cache = first_stream(model).run_streams(
        ids[:, :prompt], cache=cache, view=View(nothing, nothing, places)
    )
    shape = (rows, model.config.streams)
    counts = jnp.clip(prompt - SLOTS * jnp.arange(held, dtype=jnp.int32), 0, SLOTS)
    view = View(
        jnp.broadcast_to(blocks, (*shape, held)),
        jnp.broadcast_to(counts, (*shape, held)),
        jnp.zeros((*shape, length - prompt), jnp.int32),  # nothing reads them again
    )
    positions = jnp.broadcast_to(
        jnp.arange(prompt, length, dtype=jnp.int32), (rows, length - prompt)
    )
    x, _ = model.run_streams(ids[:, prompt:], positions=positions, cache=cache, view=view)
    return jnp.stack([exact, loss(x), jnp.sum(counted)])
