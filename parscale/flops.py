"""Parameters and floating-point operations of a model, from its shapes alone, P included."""

import functools
import math
from typing import NamedTuple

import jax
from flax import nnx

from models.config import ATTENTION, ModelConfig
from models.transformer import LanguageModel
from models.weights import StreamParam

DELTA_RULE = ("delta_net", "gated_delta_net", "kda")


class MixerSize(NamedTuple):
    """Elements of the weights of one layer's mixer.

    Attributes:
      mixer: its name.
      shared: all but the streams' own.
      matrices: of them, those that every token is multiplied with.
      streams: those of the streams' transforms inside the layer, of all streams.
    """

    mixer: str
    shared: int
    matrices: int
    streams: int


@functools.lru_cache
def mixer_sizes(config: ModelConfig) -> tuple[MixerSize, ...]:
    """A layer's mixer for each place in the pattern of mixers."""
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    repeats = config.layers // len(config.mixers)

    def size(stack, *kinds) -> int:
        state = nnx.state(stack.mixer, *kinds)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state)) // repeats

    def is_matrix(path, weight):
        return not isinstance(weight, StreamParam) and getattr(weight, "decay", False)

    shared = nnx.Not(StreamParam)
    return tuple(
        MixerSize(mixer, size(stack, shared), size(stack, is_matrix), size(stack, StreamParam))
        for mixer, stack in zip(config.mixers, model.stacks(), strict=True)
    )


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Number of parameters by part.

    Returns:
      `embedding` (token embedding and LM head), `streams` (transforms and aggregation), `total`,
      and `non_embedding`, the N of the scaling law: all but `embedding`, tied or not.
    """
    model = nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))
    count = lambda state: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    streams, rest = nnx.state(model, StreamParam, ...)
    embedding = config.vocab_size * config.width * (1 if config.tied_embeddings else 2)
    total = count(streams) + count(rest)
    return {
        "embedding": embedding,
        "streams": count(streams),
        "total": total,
        "non_embedding": total - embedding,
    }


def recurrence_macs(config: ModelConfig, mixer: str) -> int:
    """Multiply-adds of products with the state for each token and stream of a recurrent mixer.

    The state is written to by k v^T and read by q, and with the delta rule first by k, as the
    recurrence does it token by token. Chunks compute more (pairs of positions within each), but how
    much depends on their size, which is the implementation's.
    """
    heads, hk, hv = config.heads, config.key_head_dim, config.value_head_dim
    if mixer == "aaren":
        return heads * hv
    products = 3 if mixer in DELTA_RULE else 2
    normalizer = heads * hk if mixer == "mlstm_exp" else 0
    return products * heads * hk * hv + normalizer


def forward_flops(config: ModelConfig, length: int) -> int:
    """Multiplications and additions of the matrix products of one row's forward pass.

    Attention is counted over all pairs of positions, the masked ones too (with a window: over as
    many keys as it is wide), and over the prefix; a recurrence as `recurrence_macs` says. Softmax,
    norms, short convolutions, decays and other elementwise work are not counted.

    Args:
      config: the model.
      length: tokens in the row [T].
    """
    soft = config.streams > 1 and config.transform == "soft_tokens"
    low_rank = config.streams > 1 and config.transform == "low_rank"
    slots = config.transform_size if config.streams > 1 and config.transform == "prefix" else 0
    positions = length + (config.transform_size if soft else 0)
    per_token = 0
    for mixer, _, matrices, streams in mixer_sizes(config):
        per_token += matrices + 3 * config.width * config.mlp_width
        per_token += streams // config.streams if low_rank else 0
        if mixer in ATTENTION:
            keys = min(positions, config.window) if mixer == "window" else positions
            per_token += 2 * config.width * (keys + slots)
        else:
            per_token += recurrence_macs(config, mixer)
    macs = config.layers // len(config.mixers) * config.streams * positions * per_token
    if config.streams > 1 and config.aggregation == "dynamic":
        macs += length * config.width * config.streams * (config.width + 1)
    macs += length * config.width * config.vocab_size
    return 2 * macs


def train_flops(config: ModelConfig, length: int, rows: int) -> int:
    """Operations of a training step: a forward pass, and a backward pass of twice its work.

    What rematerialisation computes again is not counted (model FLOPs, not hardware FLOPs).

    Args:
      config: the model.
      length: tokens in a row [T].
      rows: rows in the step [B].
    """
    return 3 * rows * forward_flops(config, length)
