"""Parameters and operations from shapes, against the paper's counts and XLA's own count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import models.attention
from models.config import ModelConfig
from models.transformer import LanguageModel
from parscale.flops import forward_flops, parameter_counts, train_flops

# (D, F) and N at P = 1, as published.
PAPER = [
    (896, 4864, 535813376),
    (1024, 5504, 693753856),
    (1280, 6912, 1088376320),
    (1536, 8320, 1571472384),
    (2048, 11008, 2774773760),
    (2560, 13824, 4353203200),
]
PUBLISHED_AT_8 = {896: 545340552, 2560: 4414502408}


def paper_model(width: int, hidden: int, streams: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151936, width=width, layers=36, heads=16, kv_heads=2, mlp_width=hidden,
        streams=streams,
    )  # fmt: skip


@pytest.mark.parametrize(("width", "hidden", "plain"), PAPER)
def test_the_paper_counts_of_parameters_are_exact(width, hidden, plain):
    head = width // 16
    for streams in (1, 2, 4, 8):
        counts = parameter_counts(paper_model(width, hidden, streams))
        # Prefixes and the aggregator's two matrices, the biases of which are D and P.
        extra = streams * (width * width + width + 1 + 36 * 2 * 48 * 2 * head) + width
        expected = plain + (extra if streams > 1 else 0)
        assert counts["non_embedding"] == expected
        assert counts["streams"] == expected - plain
        assert counts["embedding"] == 151936 * width
        assert counts["total"] == expected + 151936 * width
        if streams == 8 and width in PUBLISHED_AT_8:
            assert expected == PUBLISHED_AT_8[width]


def test_neither_embedding_nor_head_counts_tied_or_not():
    tied = paper_model(896, 4864, 2)
    counts = parameter_counts(dataclasses.replace(tied, tied_embeddings=False))
    assert counts["non_embedding"] == parameter_counts(tied)["non_embedding"]
    assert counts["embedding"] == 2 * 151936 * 896


def dense_attention(q, k, v, mask, *, prefix=None):
    """All scores of all pairs: what the formula counts, in the plainest form."""
    if prefix is not None:
        k, v = (
            jnp.concatenate([jnp.broadcast_to(slots, (len(x), *slots.shape)), x], 2)
            for slots, x in zip((jnp.swapaxes(part, 1, 2) for part in prefix), (k, v), strict=True)
        )
    groups = q.shape[-2] // k.shape[-2]
    q = q.reshape(*q.shape[:-2], k.shape[-2], groups, q.shape[-1])
    weights = jax.nn.softmax(jnp.einsum("bptkgh,bpskh->bpkgts", q, k), -1)
    out = jnp.einsum("bpkgts,bpskh->bptkgh", weights, v)
    return out.reshape(*out.shape[:3], -1, out.shape[-1])


@pytest.mark.parametrize(
    ("streams", "transform"),
    [(1, "prefix"), (4, "prefix"), (2, "soft_tokens"), (2, "low_rank"), (2, "bias")],
)
def test_operations_are_those_that_xla_counts(streams, transform, monkeypatch):
    monkeypatch.setattr(models.attention, "attention", dense_attention)
    config = ModelConfig(
        vocab_size=1024, width=512, layers=2, heads=8, kv_heads=2, mlp_width=1408, streams=streams,
        transform=transform, transform_size=16, layer_loop="unroll",
    )  # fmt: skip
    rows, length = 2, 64
    graph, weights = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    forward = jax.jit(lambda weights, ids: nnx.merge(graph, weights)(ids))
    counted = forward.lower(nnx.to_pure_dict(weights), ids).compile().cost_analysis()["flops"]
    formula = rows * forward_flops(config, length)
    # XLA also counts elementwise work: norms, softmax, SiLU, rotation and residuals are some 40
    # operations per channel and layer beside 9000 of the products.
    assert formula < counted < 1.01 * formula
    assert train_flops(config, length, rows) == 3 * formula


def test_operations_of_a_paper_model_are_about_two_for_each_parameter():
    config = paper_model(1536, 8320, 1)
    counts = parameter_counts(config)
    matrices = counts["total"] - 36 * (2 * 1536 + 1536 + 2 * 2 * 96) - 1536
    attention = 36 * 2 * 2048 * 1536
    assert forward_flops(config, 2048) == 2 * 2048 * (matrices + attention)
    share = forward_flops(config, 2048) / (2 * 2048 * counts["total"])
    assert 1 < share < 1.13
    # Eight streams cost less than eight models: the LM head is passed once.
    eight = forward_flops(paper_model(1536, 8320, 8), 2048)
    assert 7 < eight / forward_flops(config, 2048) < 8
