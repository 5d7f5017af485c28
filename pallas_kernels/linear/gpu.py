"""Linear attention by Mosaic GPU kernels, for Hopper, of bfloat16 and float16.

Two kernels: one goes through the chunks with the state (`gpu_states`), the other computes what the
tokens of all chunks find (`gpu_outputs`), as in tiled flash linear attention (arXiv 2503.14376).
Both also run backwards in time, where they compute the gradients. Head dimensions are padded to
multiples of 64, positions to whole chunks; sums and states are float32, operands of products, and
states in memory, have the type of q.

With the delta rule, where a token's error is part of what later ones correct, that type is float16:
bfloat16's 8 bits would lose two digits of it. Values and states are then in a unit of their own, as
are the gradients that come in; keys and queries are expected to have a norm of about 1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.linear.gpu_call import Call, cut_state, padded, padded_state, turned, widened
from pallas_kernels.linear.gpu_prepare import prepare
from pallas_kernels.linear.options import Inputs, NormalizedState, Options

CHUNK = 128
CHUNKS = (64, 128, 256, 512)
DTYPES = ("bfloat16", "float16")
MAX_HEAD_DIM = 256


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
    if inputs.log_decay is not None and inputs.log_decay.ndim == 5:
        return "log_decay for each dimension of the keys: 'pallas_gpu' expects one for each head"
    if options.chunk not in CHUNKS:
        return f"chunk={options.chunk}: 'pallas_gpu' expects one of {CHUNKS}"
    return ""


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass.

    Attributes:
      states: before each chunk, `[b, H n, hv, hk]`.
      sums: float32 `[b, H, T]`, what normalized outputs were divided by, or None.
      written: with the delta rule what tokens wrote, `[b, T, H, hv]`, or None.
    """

    states: Array
    sums: Array | None
    written: Array | None


def forward(options: Options, inputs: Inputs, save: bool):
    """By the contract of `pallas_kernels.linear.api`; `starts` are `Saved`.

    Raises:
      ValueError: the inputs are `unfit`.
    """
    why = unfit(options, inputs)
    if why:
        raise ValueError(why)
    if inputs.beta is None:
        return _forward(options, inputs, save)
    narrow, unit = _in_float16(inputs)
    out, end, saved = _forward(options, narrow, save)
    end = end._replace(matrix=end.matrix * unit)
    return (out * unit).astype(inputs.v.dtype), end, saved


def backward(options: Options, inputs: Inputs, out, starts: Saved, dout, dend) -> Inputs:
    """By the contract of `pallas_kernels.linear.api`."""
    if inputs.beta is None:
        gradients = _backward(options, inputs, out, starts, dout, dend)
    else:
        narrow, unit = _in_float16(inputs)
        dunit = _unit(dout, dend.matrix)
        dout, dend = (dout / dunit).astype(narrow.v.dtype), _times(dend, 1 / dunit)
        gradients = _backward(options, narrow, out, starts, dout, dend)
        gradients = jax.tree.map(lambda x: x * dunit, gradients)
        # v and the states were divided by `unit`; what is by all else, is by their multiples.
        others = gradients._replace(v=None, initial=None, restart=None)
        others = jax.tree.map(lambda x: x * unit, others)
        linear = {name: getattr(gradients, name) for name in ("v", "initial", "restart")}
        gradients = others._replace(**linear)
    q, k, v = (x.astype(y.dtype) for x, y in zip(gradients[:3], inputs[:3], strict=True))
    return gradients._replace(q=q, k=k, v=v)


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


def _forward(options, inputs, save):
    given, inputs = inputs, padded(inputs)
    prepared, constants = prepare(options, _wide(inputs))
    call = Call(options, inputs, prepared, constants)
    start = None if inputs.initial is None else turned(inputs.initial.matrix)
    values = call.v if prepared.written is None else prepared.written
    run = call.states(call.k, values, start, {"written": prepared.leave}, prepared.found)
    written = run.get("X")
    found = call.outputs(
        call.q,
        call.k,
        call.v if written is None else written,
        {"state": run["states"], "restart": call.again},
        {
            "state": prepared.enter,
            "restart": prepared.restart,
            "before": prepared.before,
            "floor": constants.floor,
        },
    )
    end = NormalizedState(call.state(run["end"]), prepared.normalizer, constants.maximum)
    saved = Saved(run["states"], found.get("sums"), written) if save else None
    hk, hv = given.q.shape[-1], given.v.shape[-1]
    return call.untokens(found["out"])[..., :hv], cut_state(end, hk, hv), saved


def _backward(options, inputs, out, starts, dout, dend):
    """Gradients, of q, k and v in float32."""
    given, inputs = inputs, padded(inputs)
    documents = inputs.documents
    prepared, pull, constants = jax.vjp(
        lambda x: prepare(options, x._replace(documents=documents)),
        _wide(inputs)._replace(documents=None),
        has_aux=True,
    )
    call = Call(options, inputs, prepared, constants)
    out, dout, dend, dbefore = widened(out), widened(dout), padded_state(dend), None
    if options.normalize:
        dout, dbefore = _division_gradient(call, starts.sums, out, dout)
    dout = call.tokens(dout).astype(inputs.q.dtype)
    last = turned(dend.matrix)
    entering = {"state": prepared.enter, "restart": prepared.restart}
    if starts.written is None:
        v = call.v
        run = call.states(call.q, dout, last, {"written": prepared.enter}, reverse=True)
        leaving = {"state": prepared.leave}
        after = {"state": run["states"]}
        dv = call.outputs(call.k, call.q, dout, after, leaving, reverse=True)["out"]
    else:
        v = starts.written
        local = call.outputs(call.k, call.q, dout, {}, {}, reverse=True)["out"]
        factors = {"solved": prepared.leave, "more": prepared.enter}
        more = (call.q, dout)
        run = call.states(prepared.found, local, last, factors, call.k, more, reverse=True)
        dv = run["X"]
    dstates = run["states"]
    of_q = call.outputs(
        dout, v, call.k, {"state": starts.states, "restart": call.again},
        {"bias": dbefore, **entering}, against=call.q, swapped=True,
    )  # fmt: skip
    of_k = call.outputs(
        v, dout, call.q, {"state": dstates}, {"state": prepared.leave}, {"bias": dbefore},
        against=call.k, swapped=True, reverse=True,
    )  # fmt: skip
    # Products with all of a gradient, less those with the states' part: of pairs of tokens.
    by_query = of_q["against"] - prepared.enter * of_q["state"]
    by_key = of_k["against"] - prepared.leave * of_k["state"]
    cotangents = jax.tree.map(jnp.zeros_like, prepared)._replace(
        keys_low=-by_key,
        enter=of_q["state"],
        leave=of_k["state"],
        keep=_row_products(dstates, starts.states),
    )
    if call.again is not None:
        by_query = by_query - prepared.restart * of_q["restart"]
        drestart, again = _restart_gradients(call, dstates, dout)
        cotangents = cotangents._replace(restart=of_q["restart"], again=again)
    cotangents = cotangents._replace(queries_low=by_query)
    if options.normalize:
        cotangents = cotangents._replace(before=dbefore, normalizer=dend.normalizer)
    if starts.written is not None:
        cotangents = cotangents._replace(
            written=dv.astype(jnp.float32), found=_found_gradient(options, dv, starts.states)
        )
    gradients = pull(cotangents)[0]
    of_tokens = {"q": of_q["out"], "k": of_k["out"]}
    if starts.written is None:
        of_tokens["v"] = dv
    for name, x in of_tokens.items():
        like = getattr(inputs, name)
        gradients = _plus(gradients, **{name: _over_groups(call.untokens(x), like)})
    if inputs.initial is not None:
        matrix = call.state(run["end"])
        whole = inputs.initial.matrix.shape[0] == matrix.shape[0]
        matrix = matrix if whole else jnp.sum(matrix, 0, keepdims=True)
        state = gradients.initial
        gradients = gradients._replace(initial=state._replace(matrix=state.matrix + matrix))
    if call.again is not None:
        state = gradients.restart
        gradients = gradients._replace(restart=state._replace(matrix=state.matrix + drestart))
    return _cut(gradients, given)


def _wide(inputs):
    q, k, v = (x.astype(jnp.float32) for x in inputs[:3])
    return inputs._replace(q=q, k=k, v=v)


def _plus(inputs, **terms):
    return inputs._replace(**{name: getattr(inputs, name) + x for name, x in terms.items()})


def _cut(gradients, given):
    """Without padding."""
    hk, hv = given.q.shape[-1], given.v.shape[-1]
    states = {
        name: None if state is None else cut_state(state, hk, hv)
        for name, state in (("initial", gradients.initial), ("restart", gradients.restart))
    }
    q, k, v = (x[..., : y.shape[-1]] for x, y in zip(gradients[:3], given[:3], strict=True))
    return gradients._replace(q=q, k=k, v=v, **states)


def _division_gradient(call, sums, out, dout):
    """Of what was divided, and of what it was divided by, `[b, H, T]`."""
    floor = call.constants.floor
    divisor = jnp.maximum(jnp.abs(sums), floor)
    dout = dout.astype(jnp.float32) / call.untokens(divisor.swapaxes(1, 2))[..., None]
    of_divisor = call.vector(-jnp.sum(out.astype(jnp.float32) * dout, -1))
    return dout, jnp.where(jnp.abs(sums) > floor, of_divisor * jnp.sign(sums), 0.0)


def _over_groups(x, like):
    """The sum over the value heads that share a key head, float32."""
    x = x.astype(jnp.float32)
    heads = like.shape[3]
    return jnp.sum(x.reshape(*x.shape[:3], heads, -1, x.shape[-1]), 4)


def _row_products(x, y):
    """`[b, H n, hk]`: of the columns of states."""
    return jnp.einsum("bnvk,bnvk->bnk", x.astype(jnp.float32), y.astype(jnp.float32))


def _restart_gradients(call, dstates, dout):
    """Of the state that documents start from, `[P, H, hk, hv]`, by queries and by later states; and
    of its factor in these, `[b, H n, hk]`."""
    (P, H, hv, hk), (b, T, K, _) = call.again.shape, call.q.shape
    dstates = dstates.astype(jnp.float32).reshape(b // P, P, H, -1, hv, hk)
    factors = call.prepared.again.reshape(b // P, P, H, -1, hk)
    of_factors = jnp.einsum("bphnvk,phvk->bphnk", dstates, call.again.astype(jnp.float32))
    weighted = dout * call.prepared.restart.swapaxes(1, 2)[..., None]
    by_queries = jnp.einsum(
        "bptkgv,bptkd->pkgdv",
        weighted.astype(dout.dtype).reshape(b // P, P, T, K, H // K, hv),
        call.q.reshape(b // P, P, T, K, hk),
        preferred_element_type=jnp.float32,
    ).reshape(P, H, hk, hv)
    later = jnp.einsum("bphnvk,bphnk->phkv", dstates, factors)
    return by_queries + later, of_factors.reshape(b, -1, hk)


def _found_gradient(options, dwritten, states):
    """`[b, T, H, hk]`."""
    (b, T, H, hv), hk = dwritten.shape, states.shape[-1]
    found = jnp.einsum(
        "bnchv,bhnvk->bnchk",
        dwritten.reshape(b, -1, options.chunk, H, hv),
        states.reshape(b, H, -1, hv, hk),
        preferred_element_type=jnp.float32,
    )
    return found.reshape(b, T, H, hk)
