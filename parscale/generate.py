"""Sampling text from a model: a prefill, then a compiled loop over tokens with a cache."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from models.transformer import LanguageModel
from parscale.tokenizers import StreamDecoder, Tokenizer
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
        if not self.temperature >= 0:
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
    # The seed is in the keys: another one must not compile everything again.
    sampling = dataclasses.replace(sampling, seed=0)
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
        wrong = [token for token in prompt if not 0 <= token < config.vocab_size]
        if wrong:
            raise InputError(
                f"prompt {number} has token id {wrong[0]}, but the model's vocabulary is "
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

    A row shorter than the others is padded behind its end. Recurrent states pass the padding
    unchanged; the keys and values it writes are overwritten by the tokens that follow before any
    of them can see it.
    """
    model = nnx.merge(graph, params)
    cache = model.init_cache(ids.shape[0], slots)
    real = jnp.arange(ids.shape[1]) < lengths[:, None]
    x, cache = model.run_streams(ids, segment_ids=real.astype(jnp.int32), cache=cache)
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None, None], 2)
    logits = model.logits(model.mix(last))[:, 0]
    return choose(logits, keys, lengths, sampling), cache


@functools.partial(jax.jit, static_argnames=("graph", "steps", "sampling"), donate_argnames="cache")
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


def keep_candidates(logits: Float[Array, "B V"], top_k: int, top_p: float) -> Float[Array, "B V"]:
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


class TextRow:
    """The text of one row as its tokens come, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]):
        self._decoder = StreamDecoder(tokenizer)
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.done = False

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after more tokens; what may begin a stop string is held back."""
        return "" if self.done else self._take("".join(map(self._decoder.push, ids)))

    def flush(self) -> str:
        """What was held back, at the end."""
        if self.done:
            return ""
        text = self._take(self._decoder.flush()) + self._held
        self._held = ""
        return text

    def _take(self, new: str) -> str:
        text = self._held + new
        found = [(text.find(stop) + len(stop), stop) for stop in self._stops if stop in text]
        if found:
            # The stop string that is whole first counts, however the text came in pieces.
            end, _ = min(found)
            self.done, self._held = True, ""
            return text[: min(end - len(stop) for other, stop in found if other == end)]
        keep = max(
            (
                size
                for stop in self._stops
                for size in range(len(stop))
                if text.endswith(stop[:size])
            ),
            default=0,
        )
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def stream_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    *,
    stops: Sequence[str] = (),
) -> Iterator[list[str]]:
    """New text for each prompt, piece by piece; ends early when every row met a stop string.

    Args:
      model, prompts, tokens, sampling: as for `stream`.
      tokenizer: turns ids into text.
      stops: a row ends before the first of these that it would contain whole.
    """
    rows = [TextRow(tokenizer, stops) for _ in prompts]
    for ids in stream(model, prompts, tokens, sampling):
        # Ids that pad the vocabulary have no text.
        known = [row_ids[row_ids < tokenizer.vocab_size] for row_ids in ids]
        yield [row.push(new) for row, new in zip(rows, known, strict=True)]
        if all(row.done for row in rows):
            return
    yield [row.flush() for row in rows]


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
    pieces = stream_text(model, tokenizer, encoded, tokens, sampling, stops=stops)
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
