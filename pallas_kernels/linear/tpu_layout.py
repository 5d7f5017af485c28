"""How the TPU kernels of linear attention see their arrays.

A step of their grid is a chunk of some heads of one sequence. Heads stand side by side along the
lanes, as they do in memory, so that no array is transposed; the chunk is taken in tiles of up to
128 tokens, with the state between them. What the gates come to is a number for each token, and
comes along the sublanes (`columns`) or the lanes (`rows`), or both.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from pallas_kernels.linear.gates import Rows
from pallas_kernels.linear.options import LOWEST, Inputs, NormalizedState, Options
from pallas_kernels.linear.tpu_products import LANES
from pallas_kernels.linear.tpu_tile import Form, State

TILE = 128
ARRAYS_OF_A_TILE = {
    (False, False): (8, 10),
    (False, True): (10, 24),
    (True, False): (24, 46),
    (True, True): (24, 56),
}
"""Whether each dimension of a key has its own decay, and whether there is a beta: float32 arrays of
a tile and head that the forward and the backward kernel hold at once, as the compiler has it."""

SHORTEST = 16
"""Tokens of a chunk: whole registers of bfloat16."""


class Layout(NamedTuple):
    """The sizes of a call, all known when tracing.

    Attributes:
      N, P, T, K, H: lengths of these axes of the inputs.
      hk, hv: padded to whole registers.
      chunk, tile: tokens.
      heads: value heads of a step of the grid; a multiple of those that share a key head, or a
        divisor.
      together: tiles whose pairs are made together: with the delta rule they are a long chain of
        operations, of which those of two tiles need not wait for each other.
      form: of the recurrence.
    """

    N: int
    P: int
    T: int
    K: int
    H: int
    hk: int
    hv: int
    chunk: int
    tile: int
    heads: int
    together: int
    form: Form

    @property
    def sequences(self) -> int:
        return self.N * self.P

    @property
    def chunks(self) -> int:
        return -(-self.T // self.chunk)

    @property
    def groups(self) -> int:
        """Steps of the grid that the heads are."""
        return self.H // self.heads

    @property
    def shared(self) -> int:
        """Value heads that share a key head."""
        return self.H // self.K

    @property
    def key_heads(self) -> int:
        """Of a step of the grid."""
        return max(1, self.heads // self.shared)

    def key_group(self, group: Array) -> Array:
        """Which block of key heads serves this group of value heads."""
        return lax.div(group * self.heads, self.shared * self.key_heads)

    @property
    def splits(self) -> int:
        """Groups that share a key head, and each give a part of its gradient."""
        return max(1, self.shared // self.heads)


def make_layout(options: Options, inputs: Inputs, chunk: int, heads: int) -> Layout:
    """The layout with at most `chunk` tokens and `heads` value heads in a step of the grid."""
    N, P, T, K, hk = inputs.q.shape
    H, hv = inputs.v.shape[3:]
    chunk = max(SHORTEST, min(chunk, 1 << (T - 1).bit_length()))
    G = H // K
    fitting = [n for n in range(1, heads + 1) if H % n == 0 and (n % G == 0 or G % n == 0)]
    by_key = inputs.log_decay is not None and inputs.log_decay.ndim == 5
    narrow = jnp.result_type(inputs.q, inputs.k, inputs.v).name
    delta, tile = inputs.beta is not None, min(chunk, TILE)
    # There is no memory for two if more is held of each.
    single = min(hk, hv) > LANES or (by_key and narrow == "float32")
    return Layout(
        N=N,
        P=P,
        T=T,
        K=K,
        H=H,
        hk=round_up(hk, LANES),
        hv=round_up(hv, LANES),
        chunk=chunk,
        tile=tile,
        heads=fitting[-1],
        together=min(chunk // tile, 2 if delta and not single else 1),
        form=Form(options.scale, narrow, options.normalize, delta, by_key),
    )


def memory(layout: Layout, back: bool) -> int:
    """Bytes of VMEM that a kernel takes, about: blocks, each twice, and what it computes of a tile.

    Args:
      back: of the backward kernel.
    """
    L = layout
    size = 2 if L.form.narrow == "bfloat16" else 4
    keys, values = L.key_heads * L.hk, L.heads * L.hv
    tokens = size * (2 * keys + 2 * values + (back and 2 * keys + values))
    tokens += (1 + back) * 4 * LANES * 2  # of gates, along the sublanes
    if L.form.by_key:
        tokens += (1 + back) * 4 * L.heads * L.hk
    states = 4 * L.heads * L.hk * L.hv
    kept = states * (L.chunk // (L.together * L.tile)) if back else 0
    own = ARRAYS_OF_A_TILE[L.form.by_key, L.form.delta][back]
    # Products of full precision take their operands apart.
    own *= (size // 2) * 4 * L.heads * L.tile * max(L.tile, L.hk, L.hv)
    return 2 * (L.chunk * tokens + 5 * states) + kept + own


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def pad_tokens(layout: Layout, inputs: Inputs) -> Inputs:
    """`inputs` with padding after the last token, to whole chunks."""
    return inputs._replace(
        **{
            name: pad(layout, getattr(inputs, name))
            for name in ("q", "k", "v", "log_decay", "beta")
        },
        input_gate=pad(layout, inputs.input_gate, constant_values=LOWEST),
        documents=pad(layout, inputs.documents, mode="edge"),
    )


def pad(layout: Layout, x: Float[Array, "N P T ..."] | None, **how) -> Array | None:
    """`x` with zeros, or `how` else, to whole chunks."""
    more = layout.chunks * layout.chunk - layout.T
    if x is None or not more:
        return x
    return jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * (x.ndim - 3), **how)


def fold(x: Float[Array, "N P T heads h"], h: int, dtype=None) -> Float[Array, "b T lanes"]:
    """Heads side by side, each padded to `h` lanes."""
    N, P, T, heads, narrower = x.shape
    if narrower != h:
        x = jnp.pad(x, [(0, 0)] * 4 + [(0, h - narrower)])
    return x.astype(dtype or x.dtype).reshape(N * P, T, heads * h)


def unfold(layout: Layout, x: Float[Array, "b T lanes"], like: Array) -> Array:
    """The inverse of `fold`, without padding: of the shape and type of `like`."""
    heads, h = like.shape[3:]
    x = x.reshape(layout.N, layout.P, x.shape[1], heads, -1)
    return x[:, :, : layout.T, :, :h].astype(like.dtype)


class Gates(NamedTuple):
    """What the gates come to, by name: arrays like `Rows`, `[n, N, P, H, C]`, of every tile.

    Names: `low` and `high`, parts of the sums of log decays; `weight` of a token in scores; `beta`;
    `enter`, `leave`, `restart` and `floor` as in `Rows`, `leave` with the weight; `document`.

    Attributes:
      columns, rows: with gradients.
      fixed_columns, fixed_rows: without.
    """

    columns: dict[str, Array]
    rows: dict[str, Array]
    fixed_columns: dict[str, Array]
    fixed_rows: dict[str, Array]


def gates_of(form: Form, rows: Rows) -> Gates:
    """What the kernels are given of `rows`, which are of tiles.

    Args:
      rows: without sums of log decays if these are made in the kernel.
    """
    columns = {"enter": rows.enter, "leave": rows.leave, "restart": rows.restart}
    along, fixed = {}, {}
    if form.delta:
        columns["beta"] = rows.weight
    elif rows.weight is not None:
        along["weight"] = rows.weight
        columns["leave"] = rows.weight if rows.leave is None else rows.leave * rows.weight
    if rows.total is not None:
        high, low = rows.total
        exact = form.narrow == "float32"
        if exact:
            fixed["high"] = high
        columns["low"] = along["low"] = low if exact else high + low
    if rows.documents is not None:
        fixed["document"] = rows.documents.astype(jnp.float32)
    lanes_only = dict(fixed)
    if form.normalize:
        # Of outputs without their scale. It is made of the maximum, which has no gradient.
        fixed["floor"] = rows.floor / jnp.abs(form.scale)
    columns = {name: x for name, x in columns.items() if x is not None}
    return Gates(columns, along, fixed, lanes_only)


def fold_columns(layout: Layout, columns: dict[str, Array]) -> Float[Array, "b groups T lanes"]:
    """Along the sublanes; lane `i * heads + head` has the i-th name."""
    x = _stack(layout, columns).transpose(2, 3, 4, 1, 6, 0, 5)
    return x.reshape(*_leading(layout), layout.chunks * layout.chunk, -1)


def fold_rows(layout: Layout, rows: dict[str, Array]) -> Float[Array, "b groups tiles lines C"]:
    """Along the lanes; line `i * heads + head` of a tile has the i-th name."""
    x = _stack(layout, rows).transpose(2, 3, 4, 1, 0, 5, 6)
    return x.reshape(*_leading(layout), x.shape[3], -1, layout.tile)


def _leading(layout):
    return layout.sequences, layout.groups


def _stack(layout, arrays):
    n, C = next(iter(arrays.values())).shape[::4]
    shape = (n, layout.N, layout.P, layout.H, C)
    x = jnp.stack([jnp.broadcast_to(x, shape) for x in arrays.values()])
    return x.reshape(*x.shape[:4], layout.groups, layout.heads, C)


def fold_state(layout: Layout, state: NormalizedState) -> State:
    """Padded; the normalizer with an axis of one sublane."""
    matrix, normalizer, _ = state
    hk, hv = layout.hk - matrix.shape[-2], layout.hv - matrix.shape[-1]
    lead = [(0, 0)] * (matrix.ndim - 2)
    if hk or hv:
        matrix = jnp.pad(matrix, [*lead, (0, hk), (0, hv)])
    if normalizer is not None:
        normalizer = jnp.pad(normalizer, [*lead, (0, hk)])[..., None, :]
    return State(matrix.astype(jnp.float32), normalizer)


def unfold_state(state: State, hk: int, hv: int) -> State:
    matrix, normalizer = state
    if normalizer is not None:
        normalizer = normalizer[..., 0, :hk]
    return State(matrix[..., :hk, :hv], normalizer)
