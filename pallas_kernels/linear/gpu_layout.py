"""How the GPU kernels of linear attention see its arrays: N and P folded to b, padded."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.gpu_tiles import ROWS
from pallas_kernels.linear.options import Inputs, NormalizedState


def padded(inputs: Inputs) -> Inputs:
    """With head dimensions that are multiples of 64."""
    return inputs._replace(
        q=widened(inputs.q),
        k=widened(inputs.k),
        v=widened(inputs.v),
        log_decay=widened(inputs.log_decay) if per_key(inputs) else inputs.log_decay,
        initial=padded_state(inputs.initial),
        restart=padded_state(inputs.restart),
    )


def wide(inputs: Inputs) -> Inputs:
    """With tokens in float32."""
    q, k, v = (x.astype(jnp.float32) for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def per_key(inputs: Inputs) -> bool:
    """Whether each dimension of a key has its own decay."""
    return inputs.log_decay is not None and inputs.log_decay.ndim == 5


def padded_state(state: NormalizedState | None) -> NormalizedState | None:
    """As of `padded` inputs."""
    if state is None:
        return None
    normalizer = None if state.normalizer is None else widened(state.normalizer)
    return state._replace(matrix=widened(state.matrix, 2), normalizer=normalizer)


def cut_state(state: NormalizedState, hk: int, hv: int) -> NormalizedState:
    """Without that padding."""
    normalizer = None if state.normalizer is None else state.normalizer[..., :hk]
    return state._replace(matrix=state.matrix[..., :hk, :hv], normalizer=normalizer)


def widened(x: Array, axes: int = 1) -> Array:
    """With as many last axes padded."""
    widths = [(0, 0)] * (x.ndim - axes) + [(0, -size % ROWS) for size in x.shape[-axes:]]
    return jnp.pad(x, widths)


def turned(x: Float[Array, "*lead H hk hv"]) -> Float[Array, "b H_hv hk"]:
    """A state as the kernel of the states takes it."""
    x = x.mT
    return x.reshape(-1, x.shape[-3] * x.shape[-2], x.shape[-1])


def unturned(x: Float[Array, "b H_hv hk"], like: Float[Array, "N P T H hv"]) -> Array:
    """The inverse of `turned`, `[N, P, H, hk, hv]`, for values `like`."""
    N, P, _, H, hv = like.shape
    return x.reshape(N, P, H, hv, x.shape[-1]).mT


def tokens(x: Float[Array, "N P T heads h"], chunk: int) -> Float[Array, "b T heads h"]:
    """With whole chunks."""
    N, P, T, heads, h = x.shape
    x = x.reshape(N * P, T, heads, h)
    return jnp.pad(x, [(0, 0), (0, -T % chunk), (0, 0), (0, 0)])


def untokens(x: Float[Array, "b T heads h"], like: Float[Array, "N P T K hk"]) -> Array:
    """The inverse of `tokens`, `[N, P, T, heads, h]`, for as many tokens as `like` has."""
    N, P, T = like.shape[:3]
    return x[:, :T].reshape(N, P, T, *x.shape[2:])


def from_chunks(x: Float[Array, "n N P H C h"]) -> Float[Array, "b T H h"]:
    """Heads and chunks as the kernels have them."""
    n, _, _, H, C, h = x.shape
    return jnp.moveaxis(x, (0, 4), (2, 3)).reshape(-1, n * C, H, h)
