"""The TPU kernels of linear attention: over the chunks with the state, and back with its gradient.

Both hold what they carry from chunk to chunk in an output block that stays the same along the last
axis of the grid, which is in VMEM from the first chunk to the last.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels.linear.tpu_layout import Layout
from pallas_kernels.linear.tpu_tile import State, Tokens, make_pairs, pass_tile

VMEM_LIMIT = 15 * 2**20
"""Bytes; the least of any target is 16 MiB."""


def forward(
    layout: Layout, names, arrays: dict[str, Array], dtype, save: bool, interpret
) -> dict[str, Array]:
    """Output, state after the last token, and states before each chunk.

    Args:
      names: of the lanes and lines of gates, by operand.
      arrays: `q`, `k`, `v`, and of these what there is: `decay`, `columns`, `rows`,
        `fixed_columns`, `fixed_rows`, and `initial` and `restart`, `_matrix` and `_normalizer`;
        folded as in `tpu_layout`.
      dtype: of the output.

    Returns:
      `out` like v; `end_matrix` and `end_normalizer` `[b, H, ...]`; if `save`, `starts_matrix` and
      `starts_normalizer` `[chunks, b, H, ...]`.
    """
    L = layout
    results = {"out": jax.ShapeDtypeStruct(arrays["v"].shape, dtype), **states(L, "end")}
    if save:
        results |= states(L, "starts", L.chunks)
    return _call(_forward_kernel, L, names, arrays, results, interpret)


def backward(layout: Layout, names, arrays: dict[str, Array], interpret) -> dict[str, Array]:
    """Gradients of all operands of `forward`.

    Args:
      arrays: those of `forward`, with `dout` like v, `starts_` and `dend_` as its results.

    Returns:
      `d_` and the name of an operand: `d_q` and `d_k` `[splits, b, T, lanes]`, to be summed;
      `d_initial_` and `d_restart_` `[b, H, ...]`; the others like the operands.
    """
    L = layout
    like = {name: arrays[name] for name in ("v", "decay", "columns", "rows") if name in arrays}
    results = {f"d_{n}": jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in like.items()}
    for name in ("q", "k"):
        x = arrays[name]
        wide = x.dtype if L.splits == 1 else jnp.float32
        results[f"d_{name}"] = jax.ShapeDtypeStruct((L.splits, *x.shape), wide)
    results |= states(L, "d_initial")
    if "restart_matrix" in arrays:
        results |= states(L, "d_restart")
    return _call(_backward_kernel, L, names, arrays, results, interpret, back=True)


def states(layout, name, *lead):
    lead = (*lead, layout.sequences, layout.H)
    shapes = {f"{name}_matrix": (*lead, layout.hk, layout.hv)}
    if layout.form.normalize:
        shapes[f"{name}_normalizer"] = (*lead, 1, layout.hk)
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def _call(kernel, layout, names, arrays, results, interpret, back=False):
    def body(*refs):
        kernel(layout, names, dict(zip((*arrays, *results), refs, strict=True)))

    spec = functools.partial(_spec, layout, back)
    made = pl.pallas_call(
        body,
        grid=(layout.sequences, layout.groups, layout.chunks),
        in_specs=[spec(name, x.shape) for name, x in arrays.items()],
        out_specs=[spec(name, x.shape) for name, x in results.items()],
        out_shape=list(results.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        interpret=interpret,
        name=f"linear_attention{kernel.__name__.removesuffix('_kernel')}",
    )(*arrays.values())
    return dict(zip(results, made, strict=True))


def _spec(layout, back, name, shape):
    """The block of an operand or a result that step (b, group, step) of the grid is given."""
    L = layout
    chunk = (lambda c: L.chunks - 1 - c) if back else (lambda c: c)
    size, key_lanes = L.chunk, L.key_heads * L.hk
    match name.removeprefix("d_"):
        case "q" | "k" if name.startswith("d_"):
            return pl.BlockSpec(
                (None, None, size, key_lanes),
                lambda b, g, c: (lax.rem(g, L.splits), b, chunk(c), L.key_group(g)),
            )
        case "q" | "k":
            return pl.BlockSpec(
                (None, size, key_lanes), lambda b, g, c: (b, chunk(c), L.key_group(g))
            )
        case "v" | "decay" | "out" | "dout":
            return pl.BlockSpec(
                (None, size, shape[2] // L.groups), lambda b, g, c: (b, chunk(c), g)
            )
        case "columns" | "fixed_columns":
            return pl.BlockSpec((None, None, size, shape[3]), lambda b, g, c: (b, g, chunk(c), 0))
        case "rows" | "fixed_rows":
            return pl.BlockSpec(
                (None, None, size // L.tile, *shape[3:]), lambda b, g, c: (b, g, chunk(c), 0, 0)
            )
    matrix = shape[-2:]
    if name.startswith("initial"):
        batched = shape[0] > 1
        return pl.BlockSpec(
            (None, None, L.heads, *matrix),
            lambda b, g, c: (lax.div(b, L.P) if batched else 0, lax.rem(b, L.P), g, 0, 0),
        )
    if name.startswith("restart"):
        return pl.BlockSpec((None, L.heads, *matrix), lambda b, g, c: (lax.rem(b, L.P), g, 0, 0))
    if name.startswith("starts"):
        return pl.BlockSpec((None, None, L.heads, *matrix), lambda b, g, c: (chunk(c), b, g, 0, 0))
    return pl.BlockSpec((None, L.heads, *matrix), lambda b, g, c: (b, g, 0, 0))


def _forward_kernel(layout, names, refs):
    @pl.when(pl.program_id(2) == 0)
    def _():
        for part in _parts(layout):
            begin, end = refs.get(f"initial_{part}"), refs[f"end_{part}"]
            end[...] = jnp.zeros(end.shape, end.dtype) if begin is None else begin[...]

    state, again = _states(refs, "end"), _states(refs, "restart")
    _put_states(refs, "starts", state)
    for group in _groups(layout):
        moving, fixed = _load(layout, names, refs, group)
        outs, state = _pass(layout, fixed, moving, state, again)
        for index, out in zip(group, outs, strict=True):
            _put(refs["out"], layout, index, out)
    _put_states(refs, "end", state)


def _backward_kernel(layout, names, refs):
    @pl.when(pl.program_id(2) == 0)
    def _():
        for part in _parts(layout):
            refs[f"d_initial_{part}"][...] = refs[f"dend_{part}"][...]
            if f"d_restart_{part}" in refs:
                ref = refs[f"d_restart_{part}"]
                ref[...] = jnp.zeros(ref.shape, ref.dtype)

    state, again = _states(refs, "starts"), _states(refs, "restart")
    groups = _groups(layout)
    # The states before each group once more, so that one at a time holds what it computed.
    before = [state]
    for group in groups[:-1]:
        moving, fixed = _load(layout, names, refs, group)
        before.append(_pass(layout, fixed, moving, before[-1], again)[1])
    dstate, dagain = _states(refs, "d_initial"), _states(refs, "d_restart")
    for group, state in zip(reversed(groups), reversed(before), strict=True):
        moving, fixed = _load(layout, names, refs, group)
        _, pull = jax.vjp(functools.partial(_pass, layout, fixed), moving, state, again)
        douts = [_take(refs["dout"], layout, index, layout.heads) for index in group]
        dmoving, dstate, more = pull((douts, dstate))
        dagain = jax.tree.map(jnp.add, dagain, more)
        for index, gradients in zip(group, dmoving, strict=True):
            _put_gradients(layout, names, refs, index, *gradients)
    _put_states(refs, "d_initial", dstate)
    _put_states(refs, "d_restart", dagain)


def _put_gradients(layout, names, refs, index, dtokens, dcolumns, drows):
    for name in ("q", "k"):
        x = getattr(dtokens, name)
        x = x.reshape(layout.key_heads, -1, *x.shape[1:])
        _put(refs[f"d_{name}"], layout, index, jnp.sum(x, 1))
    _put(refs["d_v"], layout, index, dtokens.v)
    if "d_decay" in refs:
        _put(refs["d_decay"], layout, index, dtokens.decay)
    tokens = _tokens(layout, index)
    for i, name in enumerate(names.get("columns", ())):
        for head in range(layout.heads):
            lane = i * layout.heads + head
            refs["d_columns"][tokens, lane : lane + 1] = dcolumns[name][head]
    for i, name in enumerate(names.get("rows", ())):
        for head in range(layout.heads):
            line = i * layout.heads + head
            refs["d_rows"][index, line : line + 1] = drows[name][head]


def _groups(layout):
    """The indices of the tiles of a chunk, those together whose pairs are made together."""
    tiles = range(layout.chunk // layout.tile)
    return [tiles[i : i + layout.together] for i in tiles[:: layout.together]]


def _pass(layout, fixed, moving, state, again):
    """The outputs of some tiles, and the state after them.

    What does not depend on the state is made of all tiles and heads operation by operation, the
    rest for all heads, so that those of one do not wait for each other.
    """
    form, count = layout.form, len(moving)
    flat = functools.partial(jax.tree.map, lambda *x: jnp.concatenate(x))
    pairs = jax.vmap(functools.partial(make_pairs, form))(flat(*fixed), *flat(*moving))
    parts, tree = jax.tree.flatten(pairs)
    pairs = zip(*(jnp.split(x, count) for x in parts), strict=True)
    take, outs = jax.vmap(functools.partial(pass_tile, form)), []
    for (columns, _), (tokens, gates, _), own in zip(fixed, moving, pairs, strict=True):
        floor, beta = columns.get("floor"), gates.get("beta")
        out, state = take(floor, beta, tokens, tree.unflatten(own), state, again)
        outs.append(out)
    return outs, state


def _load(layout, names, refs, group):
    """Some tiles of all heads: `Tokens` and the gates with gradients; the gates without."""
    return zip(*(_load_tile(layout, names, refs, index) for index in group), strict=True)


def _load_tile(layout, names, refs, index):
    heads = layout.heads

    def tokens(name, count):
        if name not in refs:
            return None
        x = _take(refs[name], layout, index, count)
        return x if count == heads else jnp.repeat(x, heads // count, 0)

    def gates(operand, take):
        # Each name for itself: slices of one stack would be moved to other lanes once more.
        ref, starts = refs.get(operand), range(0, len(names.get(operand, ())) * heads, heads)
        return {
            name: jnp.stack([take(ref, slice(n, n + 1)) for n in range(start, start + heads)])
            for name, start in zip(names.get(operand, ()), starts, strict=True)
        }

    def columns(operand):
        return gates(operand, lambda ref, lane: ref[_tokens(layout, index), lane])

    def rows(operand):
        return gates(operand, lambda ref, line: ref[index, line])

    moving = Tokens(
        tokens("q", layout.key_heads),
        tokens("k", layout.key_heads),
        tokens("v", heads),
        tokens("decay", heads),
    )
    return (
        (moving, columns("columns"), rows("rows")),
        (columns("fixed_columns"), rows("fixed_rows")),
    )


def _parts(layout):
    return ("matrix", "normalizer") if layout.form.normalize else ("matrix",)


def _states(refs, name):
    if f"{name}_matrix" not in refs:
        return None
    parts = (refs.get(f"{name}_{part}") for part in State._fields)
    return State(*(None if part is None else part[...] for part in parts))


def _put_states(refs, name, state):
    for part in State._fields:
        if f"{name}_{part}" in refs:
            refs[f"{name}_{part}"][...] = getattr(state, part)


def _take(ref, layout, index, count):
    """A tile of `count` arrays side by side, `[count, C, lanes]`, float32."""
    width, tokens = ref.shape[1] // count, _tokens(layout, index)
    parts = [ref[tokens, i * width : (i + 1) * width] for i in range(count)]
    return jnp.stack([part.astype(jnp.float32) for part in parts])


def _put(ref, layout, index, x):
    """The reverse of `_take`."""
    width, tokens = x.shape[2], _tokens(layout, index)
    for i in range(x.shape[0]):
        ref[tokens, i * width : (i + 1) * width] = x[i].astype(ref.dtype)


def _tokens(layout, index):
    return slice(index * layout.tile, (index + 1) * layout.tile)
