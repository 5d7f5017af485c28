"""The published recurrences by their names: `linear_attention` with the gates of each.

Further arguments (segment_ids, initial_state, restart_state, scale, chunk, implementation) are
passed on, and what comes back is what `linear_attention` returns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.api import linear_attention


def retention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    **arguments,
):
    """Retention (arXiv 2307.08621, 2310.19731): value head j decays by 1 - 2^(-5-j) a token."""
    return linear_attention(q, k, v, log_decay=retention_decay(v), **arguments)


def retention_decay(v: Float[Array, "*lead T H hv"]) -> Float[Array, "*lead T H"]:
    """The logarithms of retention's fixed decays, for values such as `v`."""
    return jnp.broadcast_to(jnp.log1p(-jnp.exp2(-5.0 - jnp.arange(v.shape[-2]))), v.shape[:-1])


def gated_linear_attention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    log_decay: Float[Array, "*lead T H hk"],
    **arguments,
):
    """Gated linear attention (arXiv 2312.06635): each dimension of a key has its own decay."""
    _check_decay(log_decay, (*v.shape[:-1], k.shape[-1]))
    return linear_attention(q, k, v, log_decay=log_decay, **arguments)


def mlstm(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    input_gate: Float[Array, "*lead T H"],
    forget_gate: Float[Array, "*lead T H"],
    *,
    gate: str = "exponential",
    **arguments,
):
    """The mLSTM (arXiv 2405.04517; sigmoid gates: 2503.14376).

    Args:
      q, k, v, arguments: as for `linear_attention`.
      input_gate, forget_gate: what the gates are functions of. The forget gate is a sigmoid.
      gate: of the input, "exponential", with the normalizer, or "sigmoid", without.

    Raises:
      ValueError: another `gate`.
    """
    if gate not in ("exponential", "sigmoid"):
        raise ValueError(f"gate={gate!r}: expected 'exponential' or 'sigmoid'")
    is_exponential = gate == "exponential"
    return linear_attention(
        q,
        k,
        v,
        log_decay=jax.nn.log_sigmoid(forget_gate.astype(jnp.float32)),
        input_gate=input_gate if is_exponential else jax.nn.log_sigmoid(input_gate),
        normalize=is_exponential,
        **arguments,
    )


def delta_net(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    beta: Float[Array, "*lead T H"],
    **arguments,
):
    """DeltaNet (arXiv 2406.06484); keys of norm 1."""
    return linear_attention(q, k, v, beta=beta, **arguments)


def gated_delta_net(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    log_decay: Float[Array, "*lead T H"],
    beta: Float[Array, "*lead T H"],
    **arguments,
):
    """Gated DeltaNet (arXiv 2412.06464): the state of a head decays before the delta rule."""
    _check_decay(log_decay, v.shape[:-1])
    return linear_attention(q, k, v, log_decay=log_decay, beta=beta, **arguments)


def kimi_delta_attention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    log_decay: Float[Array, "*lead T H hk"],
    beta: Float[Array, "*lead T H"],
    **arguments,
):
    """Kimi delta attention (arXiv 2510.26692): each dimension of a key has its own decay."""
    _check_decay(log_decay, (*v.shape[:-1], k.shape[-1]))
    return linear_attention(q, k, v, log_decay=log_decay, beta=beta, **arguments)


def _check_decay(log_decay, expected):
    if log_decay.shape != expected:
        raise ValueError(f"log_decay {log_decay.shape}: expected {expected}")
