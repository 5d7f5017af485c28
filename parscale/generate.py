"""Text from a model: what follows prompts, whole or as it comes, by the generation engine."""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Int

from models.transformer import LanguageModel
from parscale.engine import SLOTS, Engine, Request, check_prompt
from parscale.sampling import GREEDY, Sampling
from parscale.tokenizers import StreamDecoder, Tokenizer
from sharding import rules
from sharding.settings import InputError


def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
) -> Int[np.ndarray, "B tokens"]:
    """`tokens` new token ids after each prompt; arguments and errors as for `submit_all`."""
    engine = engine_for(model, prompts, tokens)
    numbers = submit_all(engine, prompts, tokens, sampling)
    results = engine.run()
    return np.array([results[number].tokens for number in numbers], np.int32)


def engine_for(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    branches: int = 1,
    cache_tokens: int = 0,
) -> Engine:
    """An engine with room for all of these prompts at once.

    Args:
      model: any language model of ours.
      prompts: token ids of each prompt; lengths may differ.
      tokens: how many are generated after each.
      branches: in which each is written at most.
      cache_tokens: of the engine; 0: enough for all branches at once.

    Raises:
      InputError: no prompt, an empty one, an id outside the vocabulary, or more positions than the
        model has.
    """
    if not prompts:
        raise InputError("no prompt was given")
    for number, prompt in enumerate(prompts):
        check_prompt(model.config, f"prompt {number}", prompt, tokens)
    parts = rules.parts("batch")
    rows = -(-len(prompts) // parts) * parts * branches
    # Every branch may leave a block half full, and the soft tokens take some.
    longest = max(map(len, prompts)) + tokens + SLOTS
    lanes = (rows + parts) * model.config.streams
    enough = lanes * (longest + model.soft_length)
    return Engine(model, cache_tokens=cache_tokens or enough, rows=rows)


def submit_all(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = GREEDY,
    **fields,
) -> list[int]:
    """The numbers of a request for each prompt.

    Args:
      engine: takes the requests.
      prompts: token ids.
      tokens: how many are generated after each.
      sampling: how they are chosen; each prompt makes choices of its own.
      fields: others of `Request`.

    Raises:
      InputError: as for `Engine.submit`.
    """
    settings = (dataclasses.replace(sampling, index=index) for index in range(len(prompts)))
    return [
        engine.submit(Request(prompt, tokens, setting, **fields))
        for prompt, setting in zip(prompts, settings, strict=True)
    ]


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
    engine: Engine,
    tokenizer: Tokenizer,
    numbers: Sequence[int],
    *,
    stops: Sequence[str] = (),
) -> Iterator[list[str]]:
    """New text of requests that an engine runs, piece by piece.

    Args:
      engine: has them, and no others.
      tokenizer: turns ids into text.
      numbers: of the requests; each writes one text.
      stops: a text ends before the first of these that it would contain whole.

    Raises:
      InputError: a request failed.
    """
    rows = {number: TextRow(tokenizer, stops) for number in numbers}
    while not engine.idle:
        pieces = dict.fromkeys(numbers, "")
        for event in engine.step():
            row = rows[event.request]
            if event.result is not None:
                if event.result.error is not None:
                    raise event.result.error
                pieces[event.request] += row.flush()
                continue
            # Ids that pad the vocabulary have no text.
            pieces[event.request] += row.push(i for i in event.tokens if i < tokenizer.vocab_size)
            if row.done:
                engine.cancel(event.request)
        yield list(pieces.values())


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
    engine = engine_for(model, encoded, tokens)
    numbers = submit_all(engine, encoded, tokens, sampling)
    pieces = stream_text(engine, tokenizer, numbers, stops=stops)
    return ["".join(parts) for parts in zip(*pieces, strict=True)]
