"""Next-token cross-entropy without the whole array of logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def token_losses(
    x: Float[Array, "B T D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    chunk: int,
) -> Float[Array, "B T"]:
    """Cross-entropy of each token in nats, float32.

    The logits of `chunk` positions exist at a time (`[B, chunk, V]` float32); the backward pass
    computes them again, chunk by chunk.

    Args:
      x: what the LM head reads.
      head: the LM head.
      targets: id of the next token.
      chunk: positions whose logits exist at once.
    """
    length = x.shape[1]

    def losses(x, targets):
        # Cast here, not outside: the chunks' parts of the head's gradient then add up in float32.
        logits = jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32
        )
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - picked

    if length <= chunk:
        return losses(x, targets)
    losses = jax.checkpoint(losses)
    whole = length // chunk * chunk

    def chunks(array):
        parts = array[:, :whole].reshape(array.shape[0], -1, chunk, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    _, parts = jax.lax.scan(
        lambda _, part: (None, losses(*part)), None, (chunks(x), chunks(targets))
    )
    done = jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], whole)
    if whole == length:
        return done
    return jnp.concatenate([done, losses(x[:, whole:], targets[:, whole:])], 1)


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
