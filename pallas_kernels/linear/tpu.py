"""Linear attention for TPU: the entry points by the contract of `pallas_kernels.linear.api`."""

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.linear import tpu_kernels, tpu_layout
from pallas_kernels.linear.gates import make_rows
from pallas_kernels.linear.options import Inputs, NormalizedState, Options
from pallas_kernels.linear.tpu_kernels import VMEM_LIMIT
from pallas_kernels.linear.tpu_layout import Layout, make_layout, memory
from pallas_kernels.linear.tpu_tile import State

CHUNK = 256  # or a shorter one that fits in VMEM; a longer one is taken as it is, or refused
HEADS = 4  # of a step of the grid, if there are so many

WIDEST = 256
DTYPES = ("bfloat16", "float32")


def forward(options: Options, inputs: Inputs, save: bool):
    """By the contract; `starts` are for `backward`, padded."""
    layout = choose_layout(options, inputs, back=False)
    arrays, names, maximum, _ = operands(options, layout, inputs)
    made = tpu_kernels.forward(layout, names, arrays, inputs.v.dtype, save, dispatch.interpret())
    end = _unfold_end(layout, inputs, _state(made, "end"), maximum)
    starts = _state(made, "starts") if save else None
    return tpu_layout.unfold(layout, made["out"], inputs.v), end, starts


def backward(options: Options, inputs: Inputs, out, starts, dout, dend) -> Inputs:
    """By the contract."""
    del out
    layout = choose_layout(options, inputs, back=True)
    arrays, names, _, pull = operands(options, layout, inputs)
    dout = tpu_layout.fold(tpu_layout.pad(layout, dout), layout.hv, arrays["v"].dtype)
    dend = tpu_layout.fold_state(layout, dend)
    dend = jax.tree.map(lambda x: x.reshape(layout.sequences, *x.shape[2:]), dend)
    arrays |= {"dout": dout} | _named("starts", starts) | _named("dend", dend)
    made = tpu_kernels.backward(layout, names, arrays, dispatch.interpret())
    gradients = pull({name: made[f"d_{name}"] for name in ("columns", "rows") if name in names})
    for name, x in (
        ("q", jnp.sum(made["d_q"], 0)),
        ("k", jnp.sum(made["d_k"], 0)),
        ("v", made["d_v"]),
        ("log_decay", made.get("d_decay")),
    ):
        if x is not None:
            gradients[name] = tpu_layout.unfold(layout, x, getattr(inputs, name))
    for name in ("initial", "restart"):
        like = getattr(inputs, name)
        if like is not None:
            dstate = _state(made, f"d_{name}") if f"d_{name}_matrix" in made else None
            gradients[name] = _state_gradient(layout, inputs, like, dstate)
    return Inputs(**{name: gradients.get(name) for name in Inputs._fields})


def default_chunk(inputs: Inputs) -> int:
    """Positions of a chunk, the same for all recurrences."""
    del inputs
    return CHUNK


def unfit(options: Options, inputs: Inputs) -> str:
    """Why these kernels cannot take `inputs`; "" if they can."""
    dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    if dtype not in DTYPES:
        return f"q, k, v of {dtype}: 'pallas_tpu' expects bfloat16 or float32"
    hk, hv = inputs.q.shape[-1], inputs.v.shape[-1]
    if max(hk, hv) > WIDEST:
        return f"head dimensions {hk} and {hv}: 'pallas_tpu' expects at most {WIDEST}"
    if options.chunk < tpu_layout.SHORTEST:
        return f"chunk={options.chunk}: 'pallas_tpu' expects at least {tpu_layout.SHORTEST}"
    if options.chunk > CHUNK:
        most = _longest(options, inputs)
        if most < make_layout(options, inputs, options.chunk, 1).chunk:
            return (
                f"chunk={options.chunk} does not fit in the {VMEM_LIMIT >> 20} MiB of VMEM that "
                f"'pallas_tpu' may use: expected at most {most}"
            )
    return ""


def choose_layout(options: Options, inputs: Inputs, back: bool) -> Layout:
    """That of the forward or the backward kernel, with as many heads in a step as VMEM holds.

    Raises:
      ValueError: the kernels cannot take `inputs`.
    """
    why = unfit(options, inputs)
    if why:
        raise ValueError(why)
    chunk = _longest(options, inputs)
    layouts = (make_layout(options, inputs, chunk, heads) for heads in range(HEADS, 0, -1))
    return next(x for x in layouts if x.heads == 1 or memory(x, back) <= VMEM_LIMIT)


def _longest(options, inputs):
    """The longest chunk, up to that of `options`, of which a head fits in VMEM."""
    layout = make_layout(options, inputs, options.chunk, 1)
    while layout.chunk > tpu_layout.SHORTEST and memory(layout, back=True) > VMEM_LIMIT:
        layout = make_layout(options, inputs, layout.chunk // 2, 1)
    return layout.chunk


def operands(options, layout, inputs):
    """The arrays that all kernels read, by name; the names of gates, by operand; the running
    maximum; and what makes of gradients of gates those of inputs."""
    dtype = jnp.result_type(inputs.q, inputs.k, inputs.v)
    q, k, v = (tpu_layout.pad(layout, x) for x in inputs[:3])
    arrays = {
        "q": tpu_layout.fold(q, layout.hk, dtype),
        "k": tpu_layout.fold(k, layout.hk, dtype),
        "v": tpu_layout.fold(v, layout.hv, dtype),
    }
    given = {name: getattr(inputs, name) for name in ("log_decay", "beta", "input_gate")}
    if layout.form.by_key:
        decay = tpu_layout.pad(layout, given.pop("log_decay"))
        arrays["decay"] = tpu_layout.fold(decay, layout.hk, jnp.float32)
    given = {name: x for name, x in given.items() if x is not None}
    names = {}

    def gates(given):
        padded = tpu_layout.pad_tokens(layout, inputs._replace(log_decay=None)._replace(**given))
        rows = make_rows(options._replace(chunk=layout.tile), padded)
        folded, fixed = {}, {}
        for name, arrays in tpu_layout.gates_of(layout.form, rows)._asdict().items():
            if arrays:
                names[name] = tuple(arrays)
                into = fixed if name.startswith("fixed") else folded
                take = tpu_layout.fold_rows if name.endswith("rows") else tpu_layout.fold_columns
                into[name] = take(layout, arrays)
        return folded, (fixed, rows.maximum)

    folded, pull, (fixed, maximum) = jax.vjp(gates, given, has_aux=True)
    arrays |= folded | fixed
    for name in ("initial", "restart"):
        state = getattr(inputs, name)
        if state is not None and (name == "initial" or "restart" in names.get("columns", ())):
            arrays |= _named(name, tpu_layout.fold_state(layout, state))
    return arrays, names, maximum, lambda gradients: pull(gradients)[0]


def _named(name, state):
    parts = zip(State._fields, state, strict=True)
    return {f"{name}_{part}": x for part, x in parts if x is not None}


def _state(made, name) -> State:
    return State(made[f"{name}_matrix"], made.get(f"{name}_normalizer"))


def _unfold_end(layout, inputs, state: State, maximum) -> NormalizedState:
    state = tpu_layout.unfold_state(state, inputs.q.shape[-1], inputs.v.shape[-1])
    state = jax.tree.map(lambda x: x.reshape(layout.N, layout.P, *x.shape[1:]), state)
    return NormalizedState(*state, maximum)


def _state_gradient(layout, inputs, like: NormalizedState, gradient: State | None):
    """Of a state like `like`, from that of each sequence; None: zero."""
    zero = jax.tree.map(jnp.zeros_like, like)
    if gradient is None:
        return zero
    whole = _unfold_end(layout, inputs, gradient, None)

    def of(x, part):
        return part if x.shape == part.shape else jnp.sum(part, 0).reshape(x.shape)

    parts = jax.tree.map(of, like._replace(maximum=None), whole)
    return parts._replace(maximum=zero.maximum)
