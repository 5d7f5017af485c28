"""Small models with random weights for tests of the engine, and what they should write."""

import dataclasses
import functools

import numpy as np
import random_models
from flax import nnx
from jaxtyping import Float

from models.config import ModelConfig
from models.segments import Layout
from models.transformer import LanguageModel

SMALL = dataclasses.replace(random_models.SMALL, streams=2)
CLOSE = 1e-4
"""Between logits of size 5: the same float32 sums in another order."""
RUNS = 16


@functools.cache
def make_model(config: ModelConfig = SMALL) -> LanguageModel:
    """A model in which every weight counts."""
    return random_models.make_model(config)


@functools.cache
def make_writer(config: ModelConfig) -> LanguageModel:
    """A model over byte tokens that writes letters, hardly any of them twice in a row.

    Args:
      config: with tied embeddings, for tokens with small embeddings then have logits near 0.
    """
    assert config.tied_embeddings
    graph, params = nnx.split(random_models.make_model(config))
    params = nnx.to_pure_dict(params)
    letters = np.zeros(config.vocab_size, bool)
    letters[97:123] = True
    params["embedding"] = params["embedding"] * np.where(letters, 2.0, 0.2)[:, None]
    return nnx.merge(graph, params)


def logits_of(
    model: LanguageModel, ids, length: int, layout: Layout | None = None, marks=None
) -> Float[np.ndarray, "T V"]:
    """The uncached forward pass of one row, padded to `length` behind its end.

    Args:
      model: which.
      ids: tokens.
      length: of the row that is compiled for.
      layout: where the tokens stand and who sees them; None: in a line.
      marks: branches of the tokens.
    """
    size = len(ids)
    assert size <= length
    pad = lambda x: np.pad(np.asarray(x, np.int32), (0, length - size))[None]
    arguments = {}
    if layout is not None:
        runs = layout.runs
        runs = np.pad(runs, ((0, RUNS - len(runs)), (0, 0), (0, length - size)))
        mask = dataclasses.replace(layout.mask, intervals=runs, queries=length)
        arguments |= {"positions": pad(layout.positions), "mask": mask}
    if marks is not None:
        arguments["branches"] = pad(marks)
    return random_models.forward(model, pad(ids), **arguments)[0, :size]


def check_greedy(model: LanguageModel, prompt, tokens, length: int) -> None:
    """Each token has the greatest logit after those before it, in the whole row's forward pass."""
    logits = logits_of(model, [*prompt, *tokens], length)[len(prompt) - 1 : -1]
    check_best(logits, tokens)


def check_best(logits: Float[np.ndarray, "T V"], tokens) -> None:
    """Each token has the greatest of its logits."""
    tokens = np.asarray(tokens)
    assert len(logits) == len(tokens)
    chosen = np.take_along_axis(logits, tokens[:, None], 1)[:, 0]
    np.testing.assert_array_less(logits.max(1) - chosen, CLOSE)
