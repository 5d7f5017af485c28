"""Memory and latency of decoding with P streams on one chip, from the shape of the model alone.

A forward pass is a few named parts, each with its operations and the bytes it moves. A part takes
as long as the slower of the two (a roofline); parts follow one another, and what a chip needs to
start them is not counted. `decode_cost` says what such a pass does; `published_cost` holds the
assumptions under which the ParScale paper compared streams with parameters, which are not ours.
"""

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from models.config import ModelConfig
from parscale import flops
from parscale.chips import CHIPS, Chip, find_chip  # noqa: F401 (the first and last for callers)
from parscale.cost_mixers import STATE_BYTES, cache_elements, mixer_work
from sharding.settings import InputError

FLOPS_EFFICIENCY = 0.7
BANDWIDTH_EFFICIENCY = 0.9
LOGIT_BYTES = 4
PUBLISHED_BYTES = 2
PUBLISHED_NORM_BYTES = 4

parameter_counts = functools.lru_cache(flops.parameter_counts)


class Work(NamedTuple):
    """Operations and bytes of a part of a pass; of several passes, if they are arrays."""

    flops: float | np.ndarray
    bytes: float | np.ndarray

    def seconds(self, chip: Chip) -> float | np.ndarray:
        """The longer of computing and moving, at the rates of `chip`."""
        return np.maximum(self.flops / chip.flops, self.bytes / chip.bandwidth)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that decoding needs at its end.

    Attributes:
      weights: all parameters that the plain model has too.
      transform: what makes the streams differ: by default, their prefixes.
      aggregation: what mixes them.
      kv_cache: keys and values of prompt and output, and recurrent states, of all rows and streams.
      activations: the largest that exist at once, in the prefill.
    """

    weights: float
    transform: float
    aggregation: float
    kv_cache: float
    activations: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of a phase by part.

    Attributes:
      embedding: the lookup of tokens.
      norms: norms and residual sums.
      projections: queries, keys, values, gates and the output of the mixers.
      attention: scores and weighted values, or the recurrence; and the traffic of the cache.
      mlp: the three products of SwiGLU.
      aggregation: mixing of the streams.
      head: logits.
    """

    embedding: float
    norms: float
    projections: float
    attention: float
    mlp: float
    aggregation: float
    head: float

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


@dataclasses.dataclass(frozen=True)
class Cost:
    """What decoding costs.

    Attributes:
      memory: bytes by what they hold.
      prefill: seconds of the pass over the prompt.
      decode: seconds of all the steps after it together.
      steps: how many those are.
    """

    memory: Memory
    prefill: Latency
    decode: Latency
    steps: int

    @property
    def latency(self) -> float:
        """Seconds from the prompt to the last token."""
        return self.prefill.total + self.decode.total

    @property
    def step(self) -> float:
        """Mean seconds of a step after the prefill; 0 if there is none."""
        return self.decode.total / max(self.steps, 1)

    def fits(self, chip: Chip) -> bool:
        """Whether the memory of `chip` is enough."""
        return self.memory.total <= chip.memory


def forward_work(
    model: ModelConfig,
    batch: int,
    tokens: int,
    before: int | np.ndarray,
    *,
    weight_bytes: float = 2,
    activation_bytes: float = 2,
) -> dict[str, Work]:
    """Work of one forward pass, by part.

    Each weight is read once. A product reads its input and writes its output; attention reads its
    keys and values once and computes what the causal mask leaves; a recurrence reads and writes its
    state once. Streams and head are mixed and computed at the last position only.

    Args:
      model: the model.
      batch: rows [B].
      tokens: new tokens of each row [T].
      before: tokens of each row that the cache already holds; an array for several passes.
      weight_bytes: of a parameter.
      activation_bytes: of an element of an activation or of the cache.

    Returns:
      for each field of `Latency`, the work; operations are those of matrix products.
    """
    D, F, L, P = model.width, model.mlp_width, model.layers, model.streams
    aggregation = _aggregation_parameters(model)
    dynamic = P > 1 and model.aggregation == "dynamic"
    new = batch * P * tokens
    mixers = [mixer_work(model, size, batch, tokens, before) for size in flops.mixer_sizes(model)]
    repeats = L // len(mixers)
    mixer = {name: repeats * sum(getattr(m, name) for m in mixers) for name in mixers[0]._fields}

    def work(operations, weights, activations):
        return Work(operations, weight_bytes * weights + activation_bytes * activations)

    mixing = work(2 * mixer["mixed"], mixer["slots"], mixer["moved"])
    return {
        "embedding": work(0, batch * tokens * D, new * D),
        "norms": work(0, (2 * L + 1) * D, 8 * L * new * D),
        "projections": work(2 * mixer["projected"], mixer["weights"], mixer["channels"]),
        "attention": mixing._replace(bytes=mixing.bytes + mixer["state"]),
        "mlp": work(6 * L * new * D * F, 3 * L * D * F, L * new * (2 * D + 3 * F)),
        "aggregation": work(
            2 * batch * P * D * (D + 1) * dynamic, aggregation, batch * (P + 1) * D * (P > 1)
        ),
        "head": work(
            2 * batch * D * model.vocab_size,
            D * model.vocab_size,
            batch * (D + model.vocab_size * LOGIT_BYTES / activation_bytes),
        ),
    }


def decode_cost(
    model: ModelConfig,
    chip: Chip,
    batch: int,
    prompt: int,
    output: int,
    *,
    flops_efficiency: float = FLOPS_EFFICIENCY,
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
    weight_bytes: float = 2,
    activation_bytes: float = 2,
) -> Cost:
    """Cost of reading prompts and generating from them, as our own decoding does it.

    The prefill gives the first token, so that `output - 1` steps follow. Every step reads all
    weights that it uses, the prefixes once for all rows, and the cache as far as it is filled.

    Args:
      model: the model; its P streams of every row are on this chip.
      chip: where it runs.
      batch: rows at a time [B].
      prompt: tokens of each prompt.
      output: tokens generated for each.
      flops_efficiency, bandwidth_efficiency: shares of the chip's peak rates that are reached.
      weight_bytes: of a parameter.
      activation_bytes: of an element of an activation or of the cache.

    Raises:
      InputError: a number of rows or tokens below 1, or an efficiency outside 0 to 1.
    """
    _check(batch=batch, prompt=prompt, output=output)
    usable = chip.derated(flops_efficiency, bandwidth_efficiency)
    soft = model.transform_size if model.streams > 1 and model.transform == "soft_tokens" else 0
    first, steps = soft + prompt, output - 1
    work = functools.partial(
        forward_work, model, batch, weight_bytes=weight_bytes, activation_bytes=activation_bytes
    )
    counts = parameter_counts(model)
    new = batch * model.streams * first
    repeats = model.layers // len(model.mixers)
    caches = [cache_elements(model, mixer, first + output) for mixer in model.mixers]
    cached = repeats * sum(activation_bytes * n + STATE_BYTES * wide for n, wide in caches)
    # Residual stream and its norm beside gate and up of the MLP; or the logits of one position.
    layer = new * 2 * (model.width + model.mlp_width) * activation_bytes
    memory = Memory(
        weights=weight_bytes * (counts["total"] - counts["streams"]),
        transform=weight_bytes * _transform_parameters(model),
        aggregation=weight_bytes * _aggregation_parameters(model),
        kv_cache=batch * model.streams * cached,
        activations=max(layer, batch * model.vocab_size * LOGIT_BYTES),
    )
    prefill = _latency(work(first, 0), usable, 1)
    decode = _latency(work(1, first + np.arange(steps)), usable, steps)
    return Cost(memory, prefill, decode, steps)


def published_cost(
    model: ModelConfig,
    chip: Chip,
    batch: int,
    prompt: int,
    output: int,
    *,
    flops_efficiency: float = FLOPS_EFFICIENCY,
    bandwidth_efficiency: float = BANDWIDTH_EFFICIENCY,
) -> Cost:
    """Cost under the assumptions of the ParScale paper (arXiv 2505.10475, figure 4).

    The paper counted with llm-analysis (github.com/cli99/llm-analysis) at batch B P, which differs
    from `decode_cost` so:

    - two bytes each for parameters, activations and cache, four for a norm's; no biases;
    - a prefix is part of every row's prompt: it goes through the prefill and stays in the cache;
    - `output` steps follow the prefill, and each reads and writes the cache at its final length;
    - scores count in the prefill only, unmasked, together with the projections;
    - the embedding table is read whole in every pass, the LM head's weights never;
    - every position has logits, at batch B, but for the prefixes' at batch B P;
    - mixing is one pass over all tokens at the speed of the MLP, whose weights are read once.

    Args:
      model: the model; with P > 1 its transform counts as a prefix, its aggregation as dynamic.
      chip, batch, prompt, output, flops_efficiency, bandwidth_efficiency: as for `decode_cost`.

    Raises:
      InputError: as for `decode_cost`; or a model with other mixers than attention.
    """
    _check(batch=batch, prompt=prompt, output=output)
    if model.mixers != ("attention",):
        raise InputError(
            f"mixers={','.join(model.mixers)}: the paper's assumptions are of attention alone"
        )
    usable = chip.derated(flops_efficiency, bandwidth_efficiency)
    D, F, L, V, P = model.width, model.mlp_width, model.layers, model.vocab_size, model.streams
    slots = model.transform_size if P > 1 else 0
    length = slots + prompt
    square = 2 * D * D + 2 * D * model.kv_heads * model.head_dim
    aggregation = (D + 1) * D * P if P > 1 else 0
    slot_bytes = PUBLISHED_BYTES * 2 * L * batch * P * model.kv_heads * model.head_dim
    cache = slot_bytes * (length + output)

    def attended(new):  # queries, keys and values, or what stands around the scores
        return PUBLISHED_BYTES * new * max(3 * D, 2 * D + 4 * model.heads)

    def mlp(new):
        return Work(6 * new * D * F, PUBLISHED_BYTES * (3 * D * F + new * F))

    def work(tokens, kv_bytes, mixed, logits):
        new = batch * P * tokens
        mlp_work, mixing = mlp(new), mlp(batch * mixed)
        share = aggregation / (3 * D * F) if mixed else 0
        return {
            "embedding": Work(0, PUBLISHED_BYTES * V * D),
            "norms": Work(0, L * 2 * PUBLISHED_NORM_BYTES * new * D),
            "projections": Work(
                L * new * (2 * square + 4 * tokens * D),
                L * (PUBLISHED_BYTES * square + attended(new)),
            ),
            "attention": Work(0, kv_bytes),
            "mlp": Work(L * mlp_work.flops, L * mlp_work.bytes),
            "aggregation": Work(share * mixing.flops, share * mixing.bytes),
            "head": Work(2 * logits * V * D, 0),
        }

    memory = Memory(
        weights=PUBLISHED_BYTES * (L * (square + 3 * D * F + 2 * D) + D + V * D),
        transform=slot_bytes * slots,
        aggregation=PUBLISHED_BYTES * aggregation,
        kv_cache=slot_bytes * (prompt + output),
        activations=max(
            attended(batch * P * length),
            PUBLISHED_BYTES * batch * P * length * F,
            PUBLISHED_BYTES * batch * length * V,
        ),
    )
    prefill = work(length, 0, prompt + output, batch * (prompt + P * slots))
    decode = work(1, 2 * cache, 0, batch)
    return Cost(memory, _latency(prefill, usable, 1), _latency(decode, usable, output), output)


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"{name}={value}: expected at least 1")


def _aggregation_parameters(model: ModelConfig) -> int:
    P, D = model.streams, model.width
    if P == 1 or model.aggregation == "mean":
        return 0
    return P * (D * D + D + 1) + D if model.aggregation == "dynamic" else P


def _transform_parameters(model: ModelConfig) -> int:
    return parameter_counts(model)["streams"] - _aggregation_parameters(model)


def _latency(work: dict[str, Work], chip: Chip, steps: int) -> Latency:
    """Seconds of `steps` passes, whose work is the same or one element each of arrays."""
    return Latency(
        **{
            name: float(np.broadcast_to(part.seconds(chip), steps).sum())
            for name, part in work.items()
        }
    )
