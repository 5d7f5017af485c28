"""pLSTM along a line: a matrix state with gates of any sign on its source, transition and mark.

Gates may be 0 or negative, so that products of them are not exponentials of sums. They come from
doubling instead: a run of c positions is one linear map, from what enters it and its c sources to
its c outputs and what leaves it, a `[c + 1, 1 + c]` matrix, and two neighbours make one of twice
the length. `plstm_2d` does the same on a grid. Source: arXiv 2506.11997.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def plstm(
    q: Float[Array, "*lead T H hk"],
    k: Float[Array, "*lead T H hk"],
    v: Float[Array, "*lead T H hv"],
    source: Float[Array, "*lead T H"],
    transition: Float[Array, "*lead T H"],
    mark: Float[Array, "*lead T H"],
    direct: Float[Array, "*lead T H"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "*lead H hk hv"] | None = None,
    chunk: int = 64,
) -> tuple[Float[Array, "*lead T H hv"], Float[Array, "*lead H hk hv"]]:
    """The recurrence of pLSTM in one dimension.

        C_t = transition_t C_{t-1} + source_t k_t v_t^T
        y_t = scale (mark_t C_{t-1}^T q_t + direct_t (q_t . k_t) v_t)

    The mark reads the state before the position's own token. A token with transition 0 and mark 0
    starts a new document. States and sums are float32, also for narrower inputs.

    Args:
      q, k, v: queries, keys and values; any leading axes, usually B, P.
      source, transition, mark, direct: the gates S, T, M and D; stable if |transition| <= 1.
      scale: of the outputs; hk ** -0.5 by default.
      initial_state: C before the first token; zero by default.
      chunk: positions computed at once, a power of 2: 1 is the recurrent form, at least T the
        quadratic one, with every pair of positions in memory.

    Returns:
      the output in v's dtype, and C after the last token.

    Raises:
      ValueError: arguments that do not fit together.
    """
    gates = {"source": source, "transition": transition, "mark": mark, "direct": direct}
    check_arguments(q, k, v, gates, axes=1)
    check_power_of_two("chunk", chunk)
    axis, (T, H, hk), hv = q.ndim - 3, q.shape[-3:], v.shape[-1]
    shape = (*q.shape[:-3], H, hk, hv)
    if initial_state is not None and initial_state.shape != shape:
        raise ValueError(f"initial_state {initial_state.shape}: expected {shape}")
    wide = jnp.result_type(jnp.float32, q, k, v)
    state = jnp.zeros(shape, wide) if initial_state is None else initial_state.astype(wide)
    if not T:
        return jnp.zeros(v.shape, v.dtype), state
    chunk = min(chunk, 1 << (T - 1).bit_length())

    def by_chunks(x, filler=0.0):
        """`[*lead, T, H, ...]` as `[*lead, H, n, C, ...]`, filled up at the end."""
        padding = [(0, 0)] * axis + [(0, -T % chunk)] + [(0, 0)] * (x.ndim - axis - 1)
        x = jnp.pad(x.astype(wide), padding, constant_values=filler)
        x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis + 2, axis)

    # Positions of the filling pass on what enters them.
    entries = [by_chunks(x) for x in (mark, direct)]
    entries += [by_chunks(transition, 1.0), by_chunks(source)]
    maps = jnp.stack(entries, -1).reshape(*entries[0].shape, 2, 2)
    while maps.shape[-3] > 1:
        maps = _join_neighbours(maps)
    maps = maps[..., 0, :, :]
    marks, pairs = maps[..., :-1, :1], maps[..., :-1, 1:]
    transitions, sources = maps[..., -1:, :1], maps[..., -1, 1:, None]
    q, k, values = scale_or_default(scale, hk) * by_chunks(q), by_chunks(k), by_chunks(v)
    scores = jnp.einsum("...ik,...jk->...ij", q, k, precision="highest")
    within = jnp.einsum("...ij,...jv->...iv", scores * pairs, values, precision="highest")

    def step(state, xs):
        q, k, v, transition = xs
        out = jnp.einsum("...ik,...kv->...iv", q, state, precision="highest")
        state = transition * state + jnp.einsum("...ik,...iv->...kv", k, v, precision="highest")
        return state, out

    xs = (q * marks, k * sources, values, transitions)
    xs = jax.tree.map(lambda x: jnp.moveaxis(x, axis + 1, 0), xs)
    state, between = jax.lax.scan(step, state, xs)
    out = within + jnp.moveaxis(between, 0, axis + 1)
    out = jnp.moveaxis(out, axis, axis + 2).reshape(*v.shape[:axis], -1, H, hv)
    return jax.lax.slice_in_dim(out, 0, T, axis=axis).astype(v.dtype), state


def _join_neighbours(maps: Float[Array, "*some n c1 c1"]) -> Float[Array, "*some n2 d1 d1"]:
    """The maps of runs of twice the length: what leaves the first run enters the second.

    Rows of a map are the outputs of its positions and, last, what leaves; columns what enters and
    the sources of its positions.
    """
    first, second = maps[..., ::2, :, :], maps[..., 1::2, :, :]
    length = maps.shape[-1] - 1
    of_first = jnp.pad(first[..., :-1, :], [(0, 0)] * (maps.ndim - 1) + [(0, length)])
    through = second[..., :, :1] * first[..., -1:, :]
    of_second = jnp.concatenate([through, second[..., :, 1:]], -1)
    return jnp.concatenate([of_first, of_second], -2)


def scale_or_default(scale: float | None, hk: int) -> float:
    """`scale`, by default hk ** -0.5."""
    return hk**-0.5 if scale is None else scale


def check_power_of_two(name: str, value: int) -> None:
    """Raises ValueError for what is no power of 2."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name}={value}: expected a power of 2")


def check_arguments(q, k, v, gates, axes: int) -> None:
    """Raises ValueError, with the shapes, for arguments that do not fit together.

    Args:
      q, k, v: `[*lead, *places, H, h]`.
      gates: by name, each `[*lead, *places, H]`.
      axes: how many there are of places.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name}.dtype is {x.dtype}: expected a floating type")
    fits = q.ndim >= axes + 2 and k.shape == q.shape and v.shape[:-1] == q.shape[:-1]
    if not fits or 0 in q.shape[-2:] + v.shape[-1:]:
        raise ValueError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected q, k [..., {PLACES[axes]}, H, hk] "
            f"and v [..., {PLACES[axes]}, H, hv] with equal leading axes, positions and heads"
        )
    for name, gate in gates.items():
        if gate.shape != q.shape[:-1]:
            raise ValueError(f"{name} {gate.shape}: expected {q.shape[:-1]} for q {q.shape}")


PLACES = {1: "T", 2: "Y, X"}
