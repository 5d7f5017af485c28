"""The public linear attention op: checks its arguments and chooses the implementation.

An implementation is a pair of functions over `Inputs`, arrays with folded axes
(`pallas_kernels.linear.options`):

    forward(options, inputs, save) -> (out, end, starts)
    backward(options, inputs, out, starts, dout, dend) -> dinputs

`out` is like v, `end` the state after the last token, `[N, P, ...]`; `starts` are the states before
each chunk, with axes `[chunks, N, P, ...]`, None unless `save`. `dinputs` has the fields of
`inputs`, None where those are None and for documents; gradients have the types of what they are
gradients of, that of a maximum is zero.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.linear import oracle, xla
from pallas_kernels.linear.options import LOWEST, Inputs, NormalizedState, Options
from pallas_kernels.linear.states import wide_type

MODULES = {"pallas_tpu": "pallas_kernels.linear.tpu", "pallas_gpu": "pallas_kernels.linear.gpu"}
DIRECT = {"oracle": oracle.recurrent, "quadratic": oracle.quadratic, "xla": xla.chunkwise}
RECURRENT_UP_TO = 8
"""Tokens up to which the recurrence itself is the best form anywhere."""


def linear_attention(
    q: Float[Array, "*lead T K hk"],
    k: Float[Array, "*lead T K hk"],
    v: Float[Array, "*lead T H hv"],
    *,
    log_decay: Float[Array, "*lead T H"] | Float[Array, "*lead T H hk"] | None = None,
    beta: Float[Array, "*lead T H"] | None = None,
    input_gate: Float[Array, "*lead T H"] | None = None,
    normalize: bool = False,
    scale: float | None = None,
    segment_ids: Int[Array, "*some T"] | None = None,
    initial_state: Array | NormalizedState | None = None,
    restart_state: Array | NormalizedState | None = None,
    chunk: int | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*lead T H hv"], Array | NormalizedState]:
    """Attention by a recurrence whose state is a matrix S for each value head.

        S_t = (I - beta_t k_t k_t^T) diag(exp(log_decay_t)) S_{t-1} + w_t k_t v_t^T
        o_t = scale S_t^T q_t

    where w_t is beta_t, or exp(input_gate_t), or 1. Without beta this is retention (a fixed
    decay), gated linear attention (arXiv 2312.06635) or the mLSTM (2405.04517); with it DeltaNet
    (2406.06484), gated DeltaNet (2412.06464) or, with a decay for each k, Kimi delta attention
    (2510.26692). Value head j reads key head j // (H // K). States and sums are float32, also for
    narrower inputs.

    Args:
      q, k: queries and keys; any leading axes, usually B, P.
      v: values, with the leading axes of q.
      log_decay: logarithm of the decay, 0 or less, for each value head, or each of its keys'
        dimensions. Below -64 it counts as -64.
      beta: strength of the delta rule, from 0 to 2; keys should then have norm 1.
      input_gate: logarithm of the weight of each token; not together with `beta`.
      normalize: divide o_t by max(|scale n_t . q_t|, 1), n_t the same sum as S_t without v. All is
        held in units of a running maximum of the exponents, so that large gates do not overflow
        (the mLSTM's stabilizer). Not with `beta` or a decay for each dimension.
      scale: a Python number; hk ** -0.5 by default.
      segment_ids: the document of each token, with leading axes that are those of q from the left
        (`[B, T]` serves all streams). 0 is padding: its output is zero and the state passes it
        unchanged. A token of another document than the last token before it that was no padding
        starts anew.
      initial_state: what the first document of a row goes on from: float32 `[*lead, H, hk, hv]`,
        or without all but the last of the leading axes, `[P, H, hk, hv]`, read by index; a
        `NormalizedState` if `normalize`. None: as `restart_state`.
      restart_state: `[P, H, hk, hv]`, what documents start from; None: zero.
      chunk: positions computed at once, a power of 2; None: what is best for the platform.
      implementation: "xla" (chunks, on any platform), "pallas_tpu", "pallas_gpu" (Hopper),
        "oracle" (the recurrence) or "quadratic" (all pairs, for short T); None: the best that the
        platform has, which for a few tokens is the recurrence.

    Returns:
      the output in v's dtype, and the state after the last token, as `initial_state` with all
      leading axes.

    Raises:
      ValueError: an unknown implementation or one that cannot run here or not with these
        arguments, or arguments that do not fit together.
    """
    gates = {"log_decay": log_decay, "beta": beta, "input_gate": input_gate}
    check_arguments(q, k, v, gates, normalize, segment_ids, initial_state, restart_state, chunk)
    dispatch.check(implementation, (*DIRECT, *MODULES))
    lead, T = q.shape[:-3], q.shape[-3]
    inputs = _fold(q, k, v, gates, segment_ids, initial_state, restart_state, normalize)
    try:
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    except TypeError:
        raise ValueError(f"scale={scale}: expected a Python number") from None
    chunk_size = chunk or _default_chunk(implementation, inputs)
    options = Options(scale, bool(normalize), chunk_size)
    if 0 in inputs.v.shape or (implementation is None and chunk is None and T <= RECURRENT_UP_TO):
        implementation = "oracle"
    kernels = [name for name in MODULES if _can_take(name, implementation, options, inputs)]
    if implementation in DIRECT or not kernels:
        out, end = DIRECT[implementation or "xla"](options, inputs)
    else:
        out, end = _with_kernel((implementation, options, tuple(kernels)), inputs)
    end = jax.tree.map(lambda x: x.reshape(*lead, *x.shape[2:]), end)
    return out.reshape(v.shape), end if normalize else end.matrix


def _default_chunk(implementation, inputs) -> int:
    for name, module in MODULES.items():
        if implementation == name or (implementation is None and dispatch.fits(name)):
            return importlib.import_module(module).default_chunk(inputs)
    return xla.CHUNK


def _can_take(name, implementation, options, inputs) -> bool:
    if implementation is not None:
        return implementation == name
    return dispatch.fits(name) and not importlib.import_module(MODULES[name]).unfit(options, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_kernel(static, inputs):
    out, end, _ = _choose("forward", static, save=False)(inputs)
    return out, end


def _forward(static, inputs):
    out, end, starts = _choose("forward", static, save=True)(inputs)
    return (out, end), (inputs, out, starts)


def _backward(static, saved, cotangents):
    return (_choose("backward", static)(*saved, *cotangents),)


_with_kernel.defvjp(_forward, _backward)


def _choose(name, static, **arguments):
    implementation, options, kernels = static
    modules = {kernel: importlib.import_module(MODULES[kernel]) for kernel in kernels}
    functions = {
        kernel: functools.partial(getattr(module, name), options, **arguments)
        for kernel, module in {"xla": xla, **modules}.items()
    }
    if implementation is None and arguments.get("save"):
        (kernel,) = kernels  # of the platform: there is one at the most
        functions["xla"] = functools.partial(_xla_forward_like, functions[kernel], options)
    return dispatch.choose(implementation, functions)


def _xla_forward_like(kernel, options, inputs):
    """XLA's forward pass with the states that a kernel would save: in a choice by platform both
    have to return the same. XLA's backward pass does not read them."""
    out, end, _ = xla.forward(options, inputs, save=False)
    *_, starts = jax.eval_shape(kernel, inputs)
    return out, end, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), starts)


def _fold(q, k, v, gates, segment_ids, initial, restart, normalize) -> Inputs:
    """`Inputs` of arguments that fit together."""
    lead, T = q.shape[:-3], q.shape[-3]
    N, P = math.prod(lead[:-1]), math.prod(lead[-1:])
    fold = lambda x: x.reshape(N, P, *x.shape[len(lead) :])
    inputs = Inputs(q, k, v, **gates, documents=None, initial=None, restart=None)
    wide = wide_type(inputs)
    q, k, v = map(fold, (q, k, v))
    gates = {n: None if x is None else fold(x).astype(wide) for n, x in gates.items()}
    if gates["log_decay"] is not None:
        gates["log_decay"] = jnp.maximum(gates["log_decay"], LOWEST)
    documents = None
    if segment_ids is not None:
        axes = segment_ids.shape[:-1]
        segment_ids = segment_ids.reshape(*axes, *[1] * (len(lead) - len(axes)), T)
        rows = (*lead[:-1], segment_ids.shape[-2] if lead else 1, T)
        segment_ids = jnp.broadcast_to(segment_ids, rows).reshape(N, -1, T)
        documents = count_documents(segment_ids)
        live = segment_ids != 0
        of = lambda x: live.reshape(*live.shape, *[1] * (x.ndim - 3))
        q, k, v = (jnp.where(of(x), x, 0) for x in (q, k, v))
        for name, neutral in (("log_decay", 0.0), ("beta", 0.0), ("input_gate", LOWEST)):
            if gates[name] is not None:
                gates[name] = jnp.where(of(gates[name]), gates[name], neutral)
    if initial is None and restart is not None:
        initial = restart
    initial = _state(initial, normalize)
    if initial is not None:
        batched = initial.matrix.ndim == len(lead) + 3
        initial = jax.tree.map(
            lambda x: fold(x) if batched else x.reshape(1, P, *x.shape[min(len(lead), 1) :]),
            initial,
        )
    restart = _state(restart, normalize)
    if restart is not None:
        restart = jax.tree.map(lambda x: x.reshape(P, *x.shape[min(len(lead), 1) :]), restart)
    return Inputs(q, k, v, **gates, documents=documents, initial=initial, restart=restart)


def _state(state, normalize):
    if state is None or normalize:
        return None if state is None else NormalizedState(*state)
    return NormalizedState(state, None, None)


def count_documents(segment_ids: Int[Array, "*lead T"]) -> Int[Array, "*lead T"]:
    """How many documents of its row began before that of each token, int32; padding, id 0, is of
    the document before it."""
    index = jnp.arange(segment_ids.shape[-1])
    live = segment_ids != 0
    # Place of the last token up to each that is no padding; -1: none.
    last = jax.lax.cummax(jnp.where(live, index, -1), axis=segment_ids.ndim - 1)
    before = jnp.pad(last, [(0, 0)] * (last.ndim - 1) + [(1, 0)], constant_values=-1)[..., :-1]
    id_before = jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), -1)
    starts = live & (before >= 0) & (id_before != segment_ids)
    return jnp.cumsum(starts, -1, dtype=jnp.int32)


def check_arguments(
    q, k, v, gates, normalize, segment_ids=None, initial=None, restart=None, chunk=None
):
    """Raises ValueError, with the shapes, for arguments that do not fit together."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim < 3 or 0 in x.shape[-2:]:
            raise ValueError(f"{name} {x.shape}: expected [..., positions, heads, head dimension]")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype is {x.dtype}: expected a floating type")
    lead, (T, K, hk), (H, hv) = q.shape[:-3], q.shape[-3:], v.shape[-2:]
    if k.shape != q.shape or v.shape[:-2] != q.shape[:-2]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected q, k [..., T, K, hk] and "
            "v [..., T, H, hv] with equal leading axes and positions"
        )
    if H % K:
        raise ValueError(f"{H} value heads: expected a multiple of the {K} key heads")
    rows = (*lead, T, H)
    for name, gate in gates.items():
        shapes = [rows, (*rows, hk)] if name == "log_decay" else [rows]
        if gate is not None and gate.shape not in shapes:
            expected = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} {gate.shape}: expected {expected} for v {v.shape}")
    if gates["beta"] is not None and gates["input_gate"] is not None:
        raise ValueError("beta and input_gate: expected one of them; beta is the input gate too")
    if normalize and gates["beta"] is not None:
        raise ValueError("normalize with beta: the delta rule has no normalizer")
    decay = gates["log_decay"]
    if normalize and decay is not None and decay.shape != rows:
        raise ValueError(
            f"normalize with log_decay {decay.shape}: expected one decay for each head, {rows}"
        )
    if segment_ids is not None:
        axes = segment_ids.shape[:-1]
        fits = axes == lead[: len(axes)] and segment_ids.shape[-1:] == (T,)
        if not fits or not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise ValueError(
                f"segment_ids {segment_ids.shape} of {segment_ids.dtype}: expected integers "
                f"[..., {T}] whose leading axes are the first of {lead}"
            )
    for name, state in (("initial_state", initial), ("restart_state", restart)):
        _check_state(name, state, normalize, lead, (H, hk, hv))
    if chunk is not None and (chunk < 1 or chunk & (chunk - 1)):
        raise ValueError(f"chunk={chunk}: expected a power of 2")


def _check_state(name, state, normalize, lead, shape):
    if state is None:
        return
    if normalize != isinstance(state, tuple):
        expected = "a NormalizedState" if normalize else "an array"
        raise ValueError(f"{name} is a {type(state).__name__}: expected {expected}")
    leads = [lead[-1:], lead] if name == "initial_state" else [lead[-1:]]
    if normalize:
        shapes = [jnp.shape(part) for part in state]
        expected = [[(*some, *shape), (*some, *shape[:2]), (*some, shape[0])] for some in leads]
    else:
        shapes, expected = state.shape, [(*some, *shape) for some in leads]
    if shapes not in expected:
        known = " or ".join(map(str, expected))
        raise ValueError(f"{name} of shape {shapes}: expected {known}")
