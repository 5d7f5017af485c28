"""The states that documents start from, with every axis."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.options import Inputs, NormalizedState, Options


def wide_type(inputs: Inputs) -> jnp.dtype:
    """What states are held and sums are made in: float32, or float64 for inputs of it."""
    return jnp.result_type(jnp.float32, inputs.q, inputs.k, inputs.v)


def initial_state(options: Options, inputs: Inputs) -> NormalizedState:
    """What document 0 of every row starts from, `[N, P, ...]`."""
    return _whole(options, inputs, inputs.initial)


def restart_state(options: Options, inputs: Inputs) -> NormalizedState:
    """What the other documents start from, `[1, P, ...]`."""
    state = inputs.restart
    if state is not None:
        state = jax.tree.map(lambda x: x[None], state)
    return _whole(options, inputs, state, batch=1)


def _whole(options, inputs, state, batch=None):
    wide = wide_type(inputs)
    N, P, _, H, hv = inputs.v.shape
    N, hk = batch or N, inputs.q.shape[-1]
    shapes = ((N, P, H, hk, hv), (N, P, H, hk), (N, P, H))
    parts = (None, None, None) if state is None else state
    whole = [
        jnp.zeros(shape, wide) if part is None else jnp.broadcast_to(part.astype(wide), shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
    if not options.normalize:
        return NormalizedState(whole[0], None, None)
    return NormalizedState(whole[0], whole[1], jax.lax.stop_gradient(whole[2]))
