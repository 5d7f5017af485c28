"""Next-token cross-entropy without the whole array of logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding import rules


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

    def losses(x, targets, head):
        # Cast here, not outside: the chunks' parts of the head's gradient then add up in float32.
        logits = jnp.einsum(
            "btd,dv->btv", x, head.astype(x.dtype), preferred_element_type=jnp.float32
        )
        picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return jax.nn.logsumexp(logits, -1) - picked

    devices = rules.parts("chunk")
    pieces = (min(length, chunk), length % chunk)
    if devices > 1 and all(piece % devices == 0 for piece in pieces):
        losses, head = _shared(losses, devices), _copies(head, devices)
    else:
        head = _whole(head)
    if length <= chunk:
        return losses(x, targets, head)
    losses = jax.checkpoint(losses)
    whole = length // chunk * chunk

    def chunks(array):
        parts = array[:, :whole].reshape(array.shape[0], -1, chunk, *array.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    _, parts = jax.lax.scan(
        lambda _, part: (None, losses(*part, head)), None, (chunks(x), chunks(targets))
    )
    done = jnp.moveaxis(parts, 0, 1).reshape(x.shape[0], whole)
    if whole == length:
        return done
    return jnp.concatenate([done, losses(x[:, whole:], targets[:, whole:], head)], 1)


def _copies(head, devices):
    """The head as each of the devices that share a chunk has it, `[devices, D, V]`, whole along D.

    The gradient of a copy is of one device's positions. It is summed over the devices that have
    other rows first, each taking its part, and those parts over the copies.
    """
    return _whole(jnp.broadcast_to(head, (devices, *head.shape)), "chunk")


def _whole(head, *axes):
    """`head` `[..., D, V]` whole along D: its parts would make parts of logits, to be summed.

    Laid out as it is stored first, a device takes only its part of the gradient's sum.
    """
    return rules.constrain(rules.constrain(head, *axes, "embed", "vocab"), *axes, None, "vocab")


def _shared(losses, devices):
    """`losses`, its positions shared among the devices that had the streams."""

    def shared(x, targets, head):
        def split(array):
            # Whole chunks before, or the compiler would divide a row among the devices otherwise,
            # and exchange its parts.
            rest = (None for _ in array.shape[2:])
            array = rules.constrain(array, "batch", None, *rest)
            parts = array.reshape(array.shape[0], devices, -1, *array.shape[2:])
            return rules.constrain(parts, "batch", "chunk", *(None for _ in parts.shape[2:]))

        found = jax.vmap(losses, (1, 1, 0), 1)(split(x), split(targets), head)
        return rules.constrain(found.reshape(targets.shape), "batch", None)

    return shared


def perplexity(loss: float) -> float:
    """exp of a loss in nats; infinite where a float cannot hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
