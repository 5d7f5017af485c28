"""Cross-entropy in chunks against the plain one, and the memory that it does not take."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parscale.loss import token_losses


def problem(length: int, vocab: int = 50, width: int = 16):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, length, width)).astype(np.float32)
    head = rng.normal(size=(width, vocab)).astype(np.float32)
    targets = rng.integers(0, vocab, (3, length), dtype=np.int32)
    weights = rng.random((3, length)).astype(np.float32)
    return x, head, targets, weights


def numpy_losses_and_gradients(x, head, targets, weights):
    """Losses, and the gradient of their weighted sum with respect to x and head, in float64."""
    x, head = x.astype(np.float64), head.astype(np.float64)
    logits = x @ head
    logits -= logits.max(-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    rows, columns = np.indices(targets.shape)
    losses = -np.log(probabilities[rows, columns, targets])
    wrong = probabilities.copy()
    wrong[rows, columns, targets] -= 1
    wrong *= weights[..., None]
    return losses, wrong @ head.T, np.einsum("btd,btv->dv", x, wrong)


@pytest.mark.parametrize("chunk", [1, 5, 8, 13, 100])
def test_chunks_give_the_plain_cross_entropy(chunk):
    x, head, targets, weights = problem(13)

    @jax.jit
    def run(x, head):
        def loss(x, head):
            losses = token_losses(x, head, targets, chunk)
            return jnp.sum(losses * weights), losses

        (_, losses), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, head)
        return losses, *gradients

    found = run(x, head)
    for array, expected in zip(
        found, numpy_losses_and_gradients(x, head, targets, weights), strict=True
    ):
        assert array.dtype == jnp.float32
        np.testing.assert_allclose(array, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_logits_far_from_zero_stay_finite():
    x, head, targets, _ = problem(4)
    losses = np.asarray(token_losses(1e3 * x, head, targets, 2))
    assert np.isfinite(losses).all()
    assert (losses >= 0).all()


def test_bfloat16_activations_give_float32_losses_and_head_gradients():
    x, head, targets, weights = problem(64)
    rounded = jnp.asarray(x, jnp.bfloat16)
    head_rounded = np.asarray(jnp.asarray(head, jnp.bfloat16), np.float32)
    expected, _, gradient = numpy_losses_and_gradients(
        np.asarray(rounded, np.float32), head_rounded, targets, weights
    )

    @jax.jit
    def run(x, head):
        def loss(head):
            losses = token_losses(x, head, targets, 2)
            return jnp.sum(losses * weights), losses

        return jax.grad(loss, has_aux=True)(head)

    found, losses = run(rounded, head)
    assert losses.dtype == jnp.float32
    # Products of bfloat16 values are exact in float32: only the sums round.
    np.testing.assert_allclose(losses, expected, rtol=0, atol=2e-5)
    # A chunk's part of the gradient is rounded once, to 2^-8 of its value; the 32 parts are added
    # in float32, so that their roundings do not add up.
    error = np.sqrt(np.mean((found - gradient) ** 2) / np.mean(gradient**2))
    assert found.dtype == jnp.float32
    assert error < 3e-3


def test_the_logits_of_a_sequence_never_exist():
    batch, length, width, vocab, chunk = 1, 512, 64, 151936, 64
    shapes = (
        jax.ShapeDtypeStruct((batch, length, width), jnp.float32),
        jax.ShapeDtypeStruct((width, vocab), jnp.float32),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
    )

    def loss(x, head, targets):
        return jnp.mean(token_losses(x, head, targets, chunk))

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
    memory = compiled.memory_analysis().temp_size_in_bytes
    all_logits = 4 * batch * length * vocab
    # A few copies of a chunk's logits and of the head at most.
    assert memory < 4 * (all_logits * chunk / length + 4 * width * vocab)
    assert memory < all_logits
    assert f"[{batch},{length},{vocab}]" not in compiled.as_text()
