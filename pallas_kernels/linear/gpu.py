"""Linear attention by Mosaic GPU kernels, for Hopper, of bfloat16 and float16.

Two kernels: one goes through the chunks with the state (`gpu_states`), the other computes what the
tokens of all chunks find (`gpu_outputs`), as in tiled flash linear attention (arXiv 2503.14376).
Both also run backwards in time, where they compute the gradients. Head dimensions are padded to
multiples of 64, positions to whole chunks; sums and states are float32, operands of products, and
states in memory, have the type of q.

With the delta rule, where what a token writes depends on all that was written before, that type is
float16: with bfloat16's 8 bits outputs are up to 6 times less exact. Values and states are then in
a unit of their own, as are the gradients that come in, so that they are in float16's range; keys
and queries have to be in it themselves.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.linear import gpu_scalar, gpu_vector
from pallas_kernels.linear.gpu_gradients import Saved
from pallas_kernels.linear.gpu_layout import (
    cut_state,
    padded,
    padded_state,
    per_key,
    untokens,
    unturned,
    widened,
)
from pallas_kernels.linear.options import Inputs, NormalizedState, Options

CHUNKS = (64, 128, 256, 512)
DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256


def default_chunk(inputs: Inputs) -> int:
    """Positions of a chunk; XLA prepares whole chunks of the delta rule and of vector decays."""
    return 64 if inputs.beta is not None or per_key(inputs) else 128


def unfit(options: Options, inputs: Inputs) -> str:
    """Why these kernels cannot take the inputs; "" if they can."""
    for name, x in zip("qkv", inputs[:3], strict=True):
        if str(x.dtype) not in DTYPES or x.dtype != inputs.q.dtype:
            return (
                f"{name}.dtype is {x.dtype}: 'pallas_gpu' expects q, k and v of one type, bfloat16 "
                "or float16"
            )
        if x.shape[-1] > MAX_HEAD_DIM:
            return (
                f"{name} {x.shape}: 'pallas_gpu' expects head dimensions of at most {MAX_HEAD_DIM}"
            )
    if options.chunk not in CHUNKS:
        return f"chunk={options.chunk}: 'pallas_gpu' expects one of {CHUNKS}"
    return ""


def forward(options: Options, inputs: Inputs, save: bool):
    """By the contract of `pallas_kernels.linear.api`; `starts` are `gpu_gradients.Saved`.

    Raises:
      ValueError: the inputs are `unfit`.
    """
    why = unfit(options, inputs)
    if why:
        raise ValueError(why)
    given, unit = inputs, 1.0
    if inputs.beta is not None:
        inputs, unit = _in_float16(inputs)
    inputs = padded(inputs)
    out, matrix, normalizer, maximum, saved = _form(inputs).forward(options, inputs)
    end = NormalizedState(unturned(matrix, inputs.v) * unit, normalizer, maximum)
    end = cut_state(end, given.q.shape[-1], given.v.shape[-1])
    out = untokens(out, inputs.q)[..., : given.v.shape[-1]]
    if inputs.beta is not None:
        out = (out * unit).astype(given.v.dtype)
    return out, end, saved if save else None


def backward(options: Options, inputs: Inputs, out, starts: Saved, dout, dend) -> Inputs:
    """By the contract of `pallas_kernels.linear.api`."""
    given, unit, dunit = inputs, 1.0, 1.0
    if inputs.beta is not None:
        inputs, unit = _in_float16(inputs)
        dunit = _unit(dout, dend.matrix)
        dout, dend = (dout / dunit).astype(jnp.float16), _times(dend, 1 / dunit)
    inputs = padded(inputs)
    out, dout, dend = widened(out), widened(dout), padded_state(dend)
    gradients = _form(inputs).backward(options, inputs, out, starts, dout, dend)
    if inputs.beta is not None:
        gradients = _from_units(gradients, unit, dunit)
    return _like(gradients, given)


def _form(inputs):
    return gpu_vector if per_key(inputs) else gpu_scalar


def _in_float16(inputs):
    """With values and states in a unit, which comes second, so that float16 suffices for them."""
    unit = _unit(inputs.v, inputs.initial, inputs.restart)
    q, k, v = (x.astype(jnp.float16) for x in (inputs.q, inputs.k, inputs.v / unit))
    states = (_times(state, 1 / unit) for state in (inputs.initial, inputs.restart))
    initial, restart = states
    return inputs._replace(q=q, k=k, v=v, initial=initial, restart=restart), unit


def _unit(*arrays):
    """The power of 2 below the largest absolute value; 1 if that is 0."""
    largest = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in jax.tree.leaves(arrays)]
    bits = jax.lax.bitcast_convert_type(functools.reduce(jnp.maximum, largest), jnp.int32)
    exponent = jax.lax.bitcast_convert_type(bits & 0x7F800000, jnp.float32)
    return jax.lax.stop_gradient(jnp.where(exponent > 0, exponent, 1.0))


def _times(state, factor):
    return None if state is None else state._replace(matrix=state.matrix * factor)


def _from_units(gradients, unit, dunit):
    """Gradients of what was divided by `unit`, and, by its multiples, of all else."""
    names = ("v", "initial", "restart")
    linear = {name: getattr(gradients, name) for name in names}
    others = gradients._replace(**dict.fromkeys(names))
    linear = jax.tree.map(lambda x: x * dunit, linear)
    return jax.tree.map(lambda x: x * (unit * dunit), others)._replace(**linear)


def _like(gradients, given):
    """Without padding, and in the types of `given`."""
    hk, hv = given.q.shape[-1], given.v.shape[-1]
    states = {
        name: None if state is None else cut_state(state, hk, hv)
        for name, state in (("initial", gradients.initial), ("restart", gradients.restart))
    }
    q, k, v = (
        x[..., : y.shape[-1]].astype(y.dtype) for x, y in zip(gradients[:3], given[:3], strict=True)
    )
    if per_key(given):
        states["log_decay"] = gradients.log_decay[..., :hk]
    return gradients._replace(q=q, k=k, v=v, **states)
