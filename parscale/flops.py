"""Parameters and floating-point operations of a model, from its shapes alone, P included."""

import math

import jax
from flax import nnx

from models.config import ModelConfig
from models.transformer import LanguageModel
from models.weights import StreamParam


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


def forward_flops(config: ModelConfig, length: int) -> int:
    """Multiplications and additions of the matrix products of one row's forward pass.

    Attention is counted over all pairs of positions, the masked ones too, and over the prefix;
    softmax, norms and other elementwise work are not counted.

    Args:
      config: the model.
      length: tokens in the row [T].
    """
    soft = config.streams > 1 and config.transform == "soft_tokens"
    slots = config.transform_size if config.streams > 1 and config.transform == "prefix" else 0
    positions = length + (config.transform_size if soft else 0)
    heads_width, kv_width = config.width, config.kv_heads * config.head_dim
    per_token = config.width * (heads_width + 2 * kv_width) + heads_width * config.width
    per_token += 3 * config.width * config.mlp_width
    if config.streams > 1 and config.transform == "low_rank":
        per_token += config.transform_size * (2 * config.width + heads_width + kv_width)
    per_token += 2 * heads_width * (positions + slots)
    macs = config.layers * config.streams * positions * per_token
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
