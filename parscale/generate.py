"""Sampling text from a model: a prefill, then a compiled loop over tokens with a cache."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.transformer import LanguageModel
from parscale.tokenizers import Tokenizer
from sharding.settings import InputError

PROMPT_MULTIPLE = 32
"""Prompts are padded to a multiple of this length, so that few lengths are compiled."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only this many most likely tokens are candidates; 0 for all.
      top_p: only the fewest tokens whose probabilities reach this sum are candidates.
      seed: of the random choices, which for a row do not depend on the other rows.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise InputError(f"temperature={self.temperature}: expected 0 (greedy) or more")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: expected 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected more than 0, at most 1")


GREEDY = Sampling(temperature=0.0)


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
) -> Int[np.ndarray, "B tokens"]:
    """`tokens` new token ids after each prompt; arguments as for `stream`."""
    return np.concatenate(list(stream(model, prompts, tokens, sampling)), 1)


def stream(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    *,
    chunk: int = 8,
) -> Iterator[Int[np.ndarray, "B chunk"]]:
    """New token ids after each prompt, a few at a time as they are computed.

    Args:
      model: any language model of ours.
      prompts: token ids of each prompt, at least one each; lengths may differ.
      tokens: how many to generate for each.
      sampling: how they are chosen.
      chunk: how many are computed between two results.

    Raises:
      InputError: no prompt, an empty one, an id outside the vocabulary, or more positions than the
        model has.
    """
    check_prompts(model, prompts, tokens)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    padded = -(-lengths.max() // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    ids = np.zeros((len(prompts), padded), np.int32)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    if jax.default_backend() == "cpu":
        model = model.unstack()
    graph, params = nnx.split(model)
    params = nnx.to_pure_dict(params)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(sampling.seed), np.arange(len(prompts))
    )
    slots = max(padded, lengths.max() + tokens)
    slots = -(-slots // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    token, cache = prefill(graph, params, ids, lengths, keys, slots, sampling)
    yield np.asarray(token)[:, None]
    positions, done = jnp.asarray(lengths), 1
    while done < tokens:
        steps = min(chunk, tokens - done)
        token, positions, cache, new = decode(
            graph, params, token, positions, cache, keys, steps, sampling
        )
        done += steps
        yield np.asarray(new)


def check_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]], tokens: int) -> None:
    """Raises InputError if `model` cannot go on from these prompts for so many tokens."""
    config = model.config
    if not prompts:
        raise InputError("no prompt was given")
    if tokens < 1:
        raise InputError(f"tokens={tokens}: expected at least 1")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {number} is empty: give at least one character")
        if max(prompt) >= config.vocab_size or min(prompt) < 0:
            raise InputError(
                f"prompt {number} has token id {max(prompt)}, but the model's vocabulary is "
                f"{config.vocab_size}: was it tokenised with another tokenizer?"
            )
        if len(prompt) + tokens > config.max_length:
            raise InputError(
                f"prompt {number} of {len(prompt)} tokens and {tokens} new ones are more than the "
                f"model's max_length={config.max_length}"
            )


@functools.partial(jax.jit, static_argnames=("graph", "slots", "sampling"))
def prefill(
    graph: nnx.GraphDef,
    params: Any,
    ids: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    keys: Array,
    slots: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Any]:
    """The first new token of each row, and the cache after its prompt.

    A row shorter than the others is padded behind its end. What the padding writes to the cache is
    overwritten by the tokens that follow before any of them can see it.
    """
    model = nnx.merge(graph, params)
    cache = model.init_cache(ids.shape[0], slots)
    x, cache = model.run_streams(ids, cache=cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None, None], 2)
    logits = model.logits(model.mix(last))[:, 0]
    return choose(logits, keys, lengths, sampling), cache


@functools.partial(
    jax.jit, static_argnames=("graph", "steps", "sampling"), donate_argnames="cache"
)
def decode(
    graph: nnx.GraphDef,
    params: Any,
    token: Int[Array, "B"],
    positions: Int[Array, "B"],
    cache: Any,
    keys: Array,
    steps: int,
    sampling: Sampling,
) -> tuple[Int[Array, "B"], Int[Array, "B"], Any, Int[Array, "B steps"]]:
    """`steps` more tokens of each row.

    Args:
      token: the last token of each row, not yet in the cache.
      positions: where it stands.

    Returns:
      the newest token, its position, the cache, and all the new tokens.
    """
    model = nnx.merge(graph, params)

    def step(carry, _):
        token, positions, cache = carry
        logits, cache = model(token[:, None], positions=positions[:, None], cache=cache)
        token = choose(logits[:, 0], keys, positions + 1, sampling)
        return (token, positions + 1, cache), token

    (token, positions, cache), new = jax.lax.scan(step, (token, positions, cache), length=steps)
    return token, positions, cache, new.T


def choose(
    logits: Float[Array, "B V"], keys: Array, positions: Int[Array, "B"], sampling: Sampling
) -> Int[Array, "B"]:
    """A token for each row; the key of a choice is the row's key and the token's position."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = keep_candidates(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    keys = jax.vmap(jax.random.fold_in)(keys, positions)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def keep_candidates(
    logits: Float[Array, "B V"], top_k: int, top_p: float
) -> Float[Array, "B V"]:
    """`logits` with -inf where a token is outside the `top_k`, then outside the `top_p`."""
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, -1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(ordered, -1), -1) - jax.nn.softmax(ordered, -1)
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), -1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """`text` up to the first of the stop strings, and whether one was found."""
    found = [place for place in (text.find(stop) for stop in stops if stop) if place >= 0]
    return (text[: min(found)], True) if found else (text, False)


def complete(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stops: Sequence[str] = (),
) -> list[str]:
    """The text that follows each prompt, up to the first stop string."""
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    new = generate(model, encoded, tokens, sampling)
    return [cut_at_stop(tokenizer.decode(row), stops)[0] for row in new]
