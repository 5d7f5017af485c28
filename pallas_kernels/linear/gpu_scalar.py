"""Linear attention with one decay for each head, or none, by the GPU kernels."""

import jax
import jax.numpy as jnp

from pallas_kernels.linear.gpu_call import Call
from pallas_kernels.linear.gpu_gradients import (
    Saved,
    plus_states,
    restart_gradients,
    row_products,
    times_states,
)
from pallas_kernels.linear.gpu_layout import tokens, turned, untokens, unturned, wide
from pallas_kernels.linear.gpu_prepare import prepare
from pallas_kernels.linear.options import Inputs, Options


def forward(options: Options, inputs: Inputs):
    """Of padded inputs.

    Returns:
      the output `[b, T, H, hv]`, the last state `[b, H hv, hk]`, its normalizer and maximum, and
      what `backward` needs.
    """
    prepared, constants = prepare(options, wide(inputs))
    call = Call(options, inputs, prepared, constants)
    start = None if inputs.initial is None else turned(inputs.initial.matrix)
    values = call.v if prepared.written is None else prepared.written
    run = call.states(call.k, values, start, {"written": prepared.leave}, prepared.found)
    written = run.get("X")
    own = {"state": prepared.enter, "restart": prepared.restart}
    own |= {"before": prepared.before, "floor": constants.floor}
    states = {"state": run["states"], "restart": call.again}
    v = call.v if written is None else written
    found = call.outputs(call.q, call.k, v, states, own)
    saved = Saved(run["states"], found.get("sums"), written)
    return found["out"], run["end"], prepared.normalizer, constants.maximum, saved


def backward(options: Options, inputs: Inputs, out, saved: Saved, dout, dend) -> Inputs:
    """Gradients of padded inputs, float32."""
    documents = inputs.documents
    prepared, pull, constants = jax.vjp(
        lambda x: prepare(options, x._replace(documents=documents)),
        wide(inputs)._replace(documents=None),
        has_aux=True,
    )
    call = Call(options, inputs, prepared, constants)
    last, dbefore = turned(dend.matrix), None
    if options.normalize:
        dout, dbefore = _division_gradient(call, saved.sums, out, dout)
    dout = tokens(dout, options.chunk).astype(inputs.q.dtype)
    entering = {"state": prepared.enter, "restart": prepared.restart}
    leaving = {"state": prepared.leave}
    if saved.written is None:
        v = call.v
        run = call.states(call.q, dout, last, {"written": prepared.enter}, reverse=True)
        states = {"state": run["states"]}
        dv = call.outputs(call.k, call.q, dout, states, leaving, reverse=True, name="linear_dv")[
            "out"
        ]
    else:
        v = saved.written
        local = call.outputs(call.k, call.q, dout, {}, {}, reverse=True, name="linear_dv")["out"]
        factors = {"solved": prepared.leave, "more": prepared.enter}
        more = (call.q, dout)
        run = call.states(prepared.found, local, last, factors, call.k, more, reverse=True)
        dv = run["X"]
    dstates = run["states"]
    of_q = call.outputs(
        dout, v, call.k, {"state": saved.states, "restart": call.again},
        {"bias": dbefore, **entering}, against=call.q, swapped=True, name="linear_dq",
    )  # fmt: skip
    of_k = call.outputs(
        v, dout, call.q, {"state": dstates}, leaving, {"bias": dbefore},
        against=call.k, swapped=True, reverse=True, name="linear_dk",
    )  # fmt: skip
    # Products with all of a gradient, less those with the states' part: of pairs of tokens.
    by_query = of_q["against"] - prepared.enter * of_q["state"]
    by_key = of_k["against"] - prepared.leave * of_k["state"]
    cotangents = jax.tree.map(jnp.zeros_like, prepared)._replace(
        keys_low=-by_key,
        enter=of_q["state"],
        leave=of_k["state"],
        keep=row_products(dstates, saved.states),
    )
    drestart = None
    if call.again is not None:
        by_query = by_query - prepared.restart * of_q["restart"]
        restarting = prepared.restart.swapaxes(1, 2)[..., None] * dout
        drestart, again = restart_gradients(
            call.again, prepared.again, dstates, call.q, restarting.astype(dout.dtype)
        )
        cotangents = cotangents._replace(restart=of_q["restart"], again=again)
    cotangents = cotangents._replace(queries_low=by_query)
    if options.normalize:
        cotangents = cotangents._replace(before=dbefore, normalizer=dend.normalizer)
    of_tokens = {"q": of_q["out"], "k": of_k["out"]}
    if saved.written is None:
        of_tokens["v"] = dv
    else:
        found = times_states(dv, saved.states, options.chunk)
        cotangents = cotangents._replace(written=dv.astype(jnp.float32), found=found)
    gradients = pull(cotangents)[0]
    for name, x in of_tokens.items():
        part = _over_groups(untokens(x, inputs.q), getattr(inputs, name))
        gradients = gradients._replace(**{name: getattr(gradients, name) + part})
    return plus_states(gradients, unturned(run["end"], inputs.v), drestart)


def _division_gradient(call, sums, out, dout):
    """Of what was divided, and of what it was divided by, `[b, H, T]`."""
    floor, C = call.constants.floor, call.options.chunk
    divisor = jnp.maximum(jnp.abs(sums), floor).swapaxes(1, 2)
    dout = dout.astype(jnp.float32) / untokens(divisor, call.inputs.q)[..., None]
    of_divisor = -jnp.sum(out.astype(jnp.float32) * dout, -1, keepdims=True)
    of_divisor = tokens(of_divisor, C)[..., 0].swapaxes(1, 2)
    return dout, jnp.where(jnp.abs(sums) > floor, of_divisor * jnp.sign(sums), 0.0)


def _over_groups(x, like):
    """The sum over the value heads that share a key head, float32."""
    x = x.astype(jnp.float32)
    return jnp.sum(x.reshape(*x.shape[:3], like.shape[3], -1, x.shape[-1]), 4)
