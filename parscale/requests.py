"""What is asked of the generation engine, and what it tells: requests, events, results."""

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence

from models.config import ModelConfig
from parscale import layouts
from parscale.branches import Branch
from parscale.sampling import GREEDY, Sampling
from sharding.settings import InputError


@dataclasses.dataclass(frozen=True)
class Request:
    """What somebody wants written.

    Attributes:
      prompt: token ids.
      tokens: how many new ones at most; of one branch, where a layout has several.
      sampling: how they are chosen.
      until: runs of tokens, the first of which to be generated ends the text, or the text of one
        worker; what paths and thoughts end with is the layout's.
      streams: P, where the engine has models of several; 0: of the only one.
      layout: the script that writes it.
    """

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = GREEDY
    until: frozenset[tuple[int, ...]] = frozenset()
    streams: int = 0
    layout: Callable[[Branch, "Request"], Iterator] = layouts.plain


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What a request took.

    Attributes:
      generated: tokens, of all branches.
      longest: tokens that were generated one after the other, on the longest way.
      written: tokens of the prompt, and others that the layout put in.
    """

    generated: int
    longest: int
    written: int


@dataclasses.dataclass(frozen=True)
class Result:
    """How a request ended: its answer's tokens, or the error that it met."""

    tokens: list[int]
    ledger: Ledger
    error: Exception | None = None


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of a branch of a request, or its result, which comes last."""

    request: int
    branch: int = 0
    tokens: tuple[int, ...] = ()
    result: Result | None = None


def check_prompt(config: ModelConfig, what: str, prompt: Sequence[int], tokens: int) -> None:
    """Raises InputError if a model cannot go on from a prompt for so many tokens.

    Args:
      config: of the model.
      what: how the message calls the prompt.
      prompt: token ids.
      tokens: new ones.
    """
    if tokens < 1:
        raise InputError(f"{what}: tokens={tokens}: expected at least 1")
    if not len(prompt):
        raise InputError(f"{what} is empty: give at least one character")
    check_ids(config, what, prompt)
    if len(prompt) + tokens > config.max_length:
        raise InputError(
            f"{what} of {len(prompt)} tokens and {tokens} new ones are more than the model's "
            f"max_length={config.max_length}"
        )


def check_ids(config: ModelConfig, what: str, ids: Sequence[int]) -> None:
    """Raises InputError if some of these are no tokens of a model."""
    for token in ids:
        try:
            known = 0 <= operator.index(token) < config.vocab_size
        except TypeError:
            raise InputError(f"{what} has {token!r}: expected token ids") from None
        if not known:
            raise InputError(
                f"{what} has token id {token}, but the model's vocabulary is {config.vocab_size}: "
                "was it tokenised with another tokenizer?"
            )
