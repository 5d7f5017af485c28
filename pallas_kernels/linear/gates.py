"""What the gates of a chunk come to: exponents of decays between its tokens and its borders.

Within a chunk every factor is exp of a difference of two sums of log decays. Sums over strong
decays are large and their differences need not be: each is held as two numbers, `high` in whole
multiples of 2^-8, whose sums and differences are exact, and `low`, whose sums are small.

In a normalized recurrence the exponents are in units of the running maximum m, of which the
parallel forms need only one value for each token: with log_decay_t + m_{t-1} - m_t for the decay
and input_gate_t - m_t for the gate it is a recurrence without normalizer, and no factor is above 1.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.linear.options import LOWEST, Inputs, Options
from pallas_kernels.linear.states import initial_state, restart_state, wide_type

STEPS = 256  # of `high`, in 1


class Exact(NamedTuple):
    """A number, or an array of them, as the sum of two."""

    high: Array
    low: Array

    def __sub__(self, other: "Exact") -> Array:
        return (self.high - other.high) + (self.low - other.low)

    def __getitem__(self, index) -> "Exact":
        return Exact(self.high[index], self.low[index])


def split(x: Array) -> Exact:
    """`x` in whole steps and the rest; the gradient goes through the rest."""
    high = jax.lax.stop_gradient(jnp.round(x * STEPS) / STEPS)
    return Exact(high, x - high)


def in_chunks(x: Array, chunk: int, fill: float = 0.0, mode: str = "constant") -> Array:
    """`x` `[N, P, T, ...]` cut in chunks, the last one padded with `fill`: `[n, N, P, C, ...]`."""
    N, P, T = x.shape[:3]
    count = -(-T // chunk)
    if T % chunk:
        padding = [(0, 0)] * x.ndim
        padding[2] = (0, count * chunk - T)
        x = jnp.pad(x, padding, mode, **({"constant_values": fill} if mode == "constant" else {}))
    return jnp.moveaxis(x.reshape(N, P, count, chunk, *x.shape[3:]), 2, 0)


class Rows(NamedTuple):
    """Of each token of each chunk, float32: `[n, N, P, H, C]`. Where `.. hk` stands an axis of hk
    follows if each dimension of a key has its own decay. Factors that are 1 are None.

    Attributes:
      total: `.. hk`, the sum of log decays from the start of the chunk through the token (less m);
        between two tokens of a document lies the decay exp(total_i - total_j).
      weight: of what the token writes: beta, or the input gate (in units of exp(m)).
      enter: `.. hk`, factor of the state before the chunk in what the token finds; 0 for tokens of
        later documents.
      restart: `.. hk`, factor of the state that documents start from, likewise; None: there is no
        such state.
      leave: `.. hk`, factor of what the token writes in the state after the chunk.
      floor: least divisor of a normalized output, exp(-m).
      documents: int32 `[n, N, P or 1, 1, C]`, or None.
      maximum: `[N, P, H]`, m after the last token, or None.
    """

    total: Exact | None
    weight: Float[Array, "n N P H C"] | None
    enter: Array | None
    restart: Array | None
    leave: Array | None
    floor: Float[Array, "n N P H C"] | None
    documents: Int[Array, "n N P 1 C"] | None
    maximum: Float[Array, "N P H"] | None

    @property
    def keep(self) -> Array | None:
        """Factor of the state before a chunk in that after it, `[n, N, P, H]` or `.. hk`."""
        return None if self.enter is None else self.enter[:, :, :, :, -1]

    @property
    def keep_restart(self) -> Array | None:
        """The same of the state that documents start from."""
        return None if self.restart is None else self.restart[:, :, :, :, -1]


def make_rows(options: Options, inputs: Inputs) -> Rows:
    """The rows of `inputs` in chunks of `options.chunk`."""
    wide = wide_type(inputs)
    documents, is_first = _documents(options, inputs)

    def rows_of(x, fill=0.0):
        x = None if x is None else in_chunks(x.astype(wide), options.chunk, fill=fill)
        return x if x is None else jnp.moveaxis(x, 3, 4)

    decay, beta = rows_of(inputs.log_decay), rows_of(inputs.beta)
    gate = rows_of(inputs.input_gate, LOWEST)
    m = before = again = jnp.zeros((), wide)
    if options.normalize:
        if decay is None or gate is None:
            zero = jnp.zeros_like(rows_of(inputs.v[..., 0]))
            decay, gate = (zero if x is None else x for x in (decay, gate))
        m, before, again = _running_maximum(options, inputs, decay, gate, documents)
    made = Rows(
        total=None,
        weight=beta if gate is None else jnp.exp(gate - m),
        enter=None,
        restart=None,
        leave=None,
        floor=jnp.exp(jnp.minimum(-m, -LOWEST)) if options.normalize else None,
        documents=documents,
        maximum=m[-1, ..., -1] if options.normalize else None,
    )
    has_restart = documents is not None and inputs.restart is not None
    if decay is None:
        if documents is None:
            return made
        enter = is_first.astype(wide)
        leave = (documents == documents[..., -1:]).astype(wide)
        return made._replace(enter=enter, leave=leave, restart=1 - enter if has_restart else None)

    def of(x):
        """`x` `[n, N, P, H, C]` with the axes of `decay`."""
        return x.reshape(*x.shape, *[1] * (decay.ndim - 5))

    total = Exact(*(jnp.cumsum(part, 4) for part in split(decay)))
    relative = Exact(total.high, total.low - m)
    enter = jnp.exp(total.high + (relative.low + before))
    leave = jnp.exp(relative[:, :, :, :, -1:] - relative)
    restart = None
    if documents is not None:
        if has_restart:
            since = _sum_in_document(documents, decay) - of(m - again)
            restart = jnp.where(of(is_first), 0, jnp.exp(jnp.where(of(is_first), 0, since)))
        enter = jnp.where(of(is_first), enter, 0)
        leave = jnp.where(of(documents == documents[..., -1:]), leave, 0)
    return made._replace(total=relative, enter=enter, restart=restart, leave=leave)


def _documents(options, inputs):
    """Documents in chunks `[n, N, P or 1, 1, C]`, and which tokens are of the document before the
    chunk."""
    if inputs.documents is None:
        return None, None
    documents = in_chunks(inputs.documents, options.chunk, mode="edge")[:, :, :, None]
    last = documents[..., -1:]
    before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
    return documents, documents == before


def _sum_in_document(documents, decay):
    """The sum of `decay` `.. hk` over the tokens of a chunk through each that are of its document,
    as a product: the gradient of a lookup of what stands at the border would be a scatter."""
    documents = documents[:, :, :, 0]
    together = documents[..., :, None] == documents[..., None, :]
    together = (together & jnp.tri(documents.shape[-1], dtype=bool)).astype(decay.dtype)
    if together.shape[2] == 1:
        return jnp.einsum("nbij,nbphj...->nbphi...", together[:, :, 0], decay, precision="highest")
    return jnp.einsum("nbpij,nbphj...->nbphi...", together, decay, precision="highest")


def _running_maximum(options, inputs, decay, gate, documents):
    """m of each token, before each chunk `[n, N, P, H, 1]`, and of the state that documents start
    from, `[1, P, H, 1]`: m_t = max(m_{t-1} + decay_t, gate_t), by a scan over such maps."""
    n, N, P, H, C = decay.shape
    begin, again = (
        state(options, inputs).maximum[..., None] for state in (initial_state, restart_state)
    )
    whole = lambda x: jnp.moveaxis(x, 0, -2).reshape(*x.shape[1:-1], n * C)
    decay, gate = whole(decay), whole(gate)
    first = jnp.arange(n * C) == 0
    new, source = first, begin
    if documents is not None:
        documents = whole(documents)
        border = documents != jnp.pad(documents, [(0, 0)] * 3 + [(1, 0)])[..., :-1]
        source = jnp.where(border, again, begin)
        new = border | first
    gate = jnp.where(new, jnp.maximum(source + decay, gate), gate)
    decay = jnp.where(new, -jnp.inf, decay)

    def after(one, two):
        return one[0] + two[0], jnp.maximum(one[1] + two[0], two[1])

    _, m = jax.lax.associative_scan(after, jax.lax.stop_gradient((decay, gate)), axis=3)
    m = jnp.moveaxis(m.reshape(N, P, H, n, C), 3, 0)
    begin = jnp.broadcast_to(begin, (*m.shape[1:-1], 1))
    return m, jnp.concatenate([begin[None], m[:-1, ..., -1:]]), again
