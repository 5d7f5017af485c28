"""The loss after a prompt that the first stream alone has read, against layers written out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import ModelConfig
from models.layers import apply_rope, rope_tables
from models.transformer import LanguageModel
from parscale.shared_prompt import compare
from sharding.settings import InputError

CONFIG = ModelConfig(
    vocab_size=40, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48, streams=3,
    transform_size=4, max_length=64, init_std=0.3, transform_std=1.0,
)  # fmt: skip
LENGTH, PROMPT = 27, 19


def make_batch(rows=3):
    ids = np.random.default_rng(0).integers(0, 40, (rows, LENGTH + 1), dtype=np.int32)
    segments = np.ones((rows, LENGTH), np.int32)
    segments[-1, 9:] = 2  # a row of two documents, which does not count
    return {
        "ids": ids[:, :-1],
        "targets": ids[:, 1:],
        "segment_ids": segments,
        "mask": np.ones((rows, LENGTH), np.float32),
    }


def logits_with_shared_prompt(model, ids):
    """Layer after layer: every stream's prompt has the first one's keys and values."""
    config = model.config
    x = jnp.broadcast_to(model.embedding[...][ids], (config.streams, len(ids), config.width))
    rope = rope_tables(jnp.arange(len(ids))[None], config.head_dim, config.rope_theta)
    causal = np.tril(np.ones((len(ids), len(ids)), bool))
    wide = lambda part: jnp.repeat(part, config.heads // config.kv_heads, -2)
    for index in range(config.layers):
        layer = model.unstack().layers[index]
        mixer, y = layer.mixer, layer.mixer_norm(x)
        q, k, v = (
            jnp.einsum("ptd,dnh->ptnh", y, getattr(mixer, n)[...])
            + getattr(mixer, f"{n}_bias")[...]
            for n in "qkv"
        )
        q, k = (apply_rope(part[None], rope)[0] for part in (q, k))
        k, v = (part.at[:, :PROMPT].set(part[0, :PROMPT]) for part in (k, v))
        prefix_k, prefix_v = (jnp.swapaxes(part, 1, 2) for part in mixer.streams.prefix())
        # Queries of the prompt are the first stream's too.
        q = q.at[:, :PROMPT].set(q[0, :PROMPT])
        places = jnp.where(jnp.arange(len(ids)) < PROMPT, 0, jnp.arange(config.streams)[:, None])
        scores = jnp.einsum("ptnh,psnh->pnts", q, wide(k)) * config.head_dim**-0.5
        scores = jnp.where(causal, scores, -jnp.inf)
        own = wide(prefix_k)[places]  # [P, T, M, H, h]
        of_prefix = jnp.einsum("ptnh,ptmnh->pntm", q, own) * config.head_dim**-0.5
        weights = jax.nn.softmax(jnp.concatenate([of_prefix, scores], -1), -1)
        slots = config.transform_size
        out = jnp.einsum("pnts,psnh->ptnh", weights[..., slots:], wide(v))
        out += jnp.einsum("pntm,ptmnh->ptnh", weights[..., :slots], wide(prefix_v)[places])
        out = jnp.einsum("ptnh,nhd->ptd", out, mixer.o[...])
        x = (
            x.at[:, PROMPT:]
            .add(out[:, PROMPT:])
            .at[:, :PROMPT]
            .set(x[0, :PROMPT] + out[0, :PROMPT])
        )
        x = x + layer.mlp(layer.mlp_norm(x))
    return model.logits(model.mix(model.norm(x)[None]))[0]


def test_losses_against_layers_written_out():
    model, batch = LanguageModel(CONFIG, rngs=nnx.Rngs(0)), make_batch()
    found = compare(model, [batch, batch], PROMPT, chunk=8)
    expected = {"exact": [], "shared": []}
    for ids, targets in zip(batch["ids"][:2], batch["targets"][:2], strict=True):
        for name, logits in (
            ("exact", model(ids[None])[0]), ("shared", logits_with_shared_prompt(model, ids)),
        ):  # fmt: skip
            chosen = jax.nn.log_softmax(logits)[np.arange(LENGTH), targets]
            expected[name].append(-np.mean(chosen[PROMPT:]))
    assert found.tokens == 2 * 2 * (LENGTH - PROMPT)
    for name, values in expected.items():
        # The same float32 sums in another order.
        assert getattr(found, name) == pytest.approx(np.mean(values), abs=2e-5)
    assert abs(found.exact - found.shared) > 1e-3


@pytest.mark.parametrize(
    ("changes", "prompt", "words"),
    [
        ({"streams": 1}, PROMPT, "streams=1: there is no other stream"),
        ({"transform": "soft_tokens"}, PROMPT, "transform=soft_tokens: the first stream cannot"),
        ({"mixers": ("gla",)}, PROMPT, "mixers=gla"),
        ({}, LENGTH, "shared_prompt=27: expected 1 to 26, less than the 27 tokens of a row"),
    ],
)
def test_what_cannot_be_compared(changes, prompt, words):
    model = LanguageModel(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=words):
        compare(model, [make_batch()], prompt, chunk=8)


def test_no_row_of_one_document():
    batch = make_batch()
    batch["segment_ids"][:, 5:] = 2
    with pytest.raises(InputError, match="no row is of one document"):
        compare(LanguageModel(CONFIG, rngs=nnx.Rngs(0)), [batch], PROMPT, chunk=8)
