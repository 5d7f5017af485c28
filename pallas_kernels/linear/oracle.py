"""Linear attention as it is defined: token by token, and as an independent quadratic form.

The recurrence is what other forms are tested by, and what decodes: one token is one step. The
quadratic form has every pair of positions in memory and solves one triangular system for a whole
row: it is a check, for short rows.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.linear.options import Inputs, NormalizedState, Options
from pallas_kernels.linear.states import initial_state, restart_state, wide_type


def recurrent(options: Options, inputs: Inputs) -> tuple[Array, NormalizedState]:
    """The output, like v, and the state after the last token `[N, P, ...]`, by a scan."""
    wide = wide_type(inputs)
    group = inputs.v.shape[3] // inputs.q.shape[3]
    begin, again = initial_state(options, inputs), restart_state(options, inputs)
    documents = inputs.documents
    if documents is None:
        documents = jnp.zeros((1, 1, inputs.q.shape[2]), jnp.int32)

    def step(carry, token):
        state, before = carry
        q, k, v, log_decay, beta, input_gate, document = token
        q, k = (jnp.repeat(x.astype(wide), group, axis=-2) for x in (q, k))
        v = v.astype(wide)
        if inputs.documents is not None:
            state = jax.tree.map(
                lambda old, new: jnp.where(_like(document == before, old), old, new), state, again
            )
        S, n, m = state
        decay = jnp.zeros(v.shape[:-1], wide) if log_decay is None else log_decay.astype(wide)
        gate = jnp.zeros(v.shape[:-1], wide) if input_gate is None else input_gate.astype(wide)
        if options.normalize:
            top = jax.lax.stop_gradient(jnp.maximum(m + decay, gate))
            decay, gate, m = decay + m - top, gate - top, top
        decay = jnp.exp(decay if decay.ndim == 4 else decay[..., None])
        S = decay[..., None] * S
        if beta is None:
            written = jnp.exp(gate)[..., None] * v
        else:
            written = beta.astype(wide)[..., None] * (v - jnp.einsum("...k,...kv->...v", k, S))
        S = S + k[..., None] * written[..., None, :]
        out = options.scale * jnp.einsum("...k,...kv->...v", q, S)
        if options.normalize:
            n = decay * n + jnp.exp(gate)[..., None] * k
            total = jnp.abs(options.scale * jnp.sum(q * n, -1))
            out = out / jnp.maximum(total, jnp.exp(-m))[..., None]
        return (NormalizedState(S, n, m), document), out

    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), (*inputs[:6], documents))
    with jax.default_matmul_precision("highest"):
        (end, _), out = jax.lax.scan(step, (begin, jnp.zeros_like(documents[..., 0])), tokens)
    return jnp.moveaxis(out, 0, 2).astype(inputs.v.dtype), end


def quadratic(options: Options, inputs: Inputs) -> tuple[Array, NormalizedState]:
    """As `recurrent`, from products over all pairs `[N, P, H, T, T]`.

    The state of a normalized recurrence comes with a maximum of 0.
    """
    wide = wide_type(inputs)
    T, K, _ = inputs.q.shape[2:]
    q, k, v, decay, beta, gate = (
        None if x is None else jnp.moveaxis(x, 2, 3).astype(wide) for x in inputs[:6]
    )
    q, k = (jnp.repeat(x, v.shape[2] // K, axis=2) for x in (q * options.scale, k))
    decay = jnp.zeros(v.shape[:-1], wide) if decay is None else decay
    decay = jnp.broadcast_to(decay if decay.ndim == 5 else decay[..., None], k.shape)
    weight = jnp.ones(v.shape[:-1], wide) if gate is None else jnp.exp(gate)
    documents = inputs.documents
    documents = jnp.zeros((1, 1, T), jnp.int32) if documents is None else documents
    documents = documents[:, :, None]
    seen = (documents[..., :, None] == documents[..., None, :]) & jnp.tri(T, dtype=bool)

    # Decay from the end of token j to that of token i, and from the start of i's document.
    total = jnp.cumsum(decay, 3)
    fades = total[..., :, None, :] - total[..., None, :, :]
    fades = jnp.exp(jnp.where(seen[..., None], fades, -jnp.inf))
    since = jnp.argmax(seen, -1)[..., None]
    since = jnp.exp(total - jnp.take_along_axis(total - decay, jnp.broadcast_to(since, k.shape), 3))
    S, n = _found(options, inputs, documents)

    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("...ik,...jk,...ijk->...ij", q, k, fades)
        written = weight[..., None] * v
        if beta is not None:
            overlap = jnp.einsum("...ik,...jk,...ijk->...ij", k, k, fades)
            expected = jnp.einsum("...tk,...tkv->...tv", k * since, S)
            written = _substitute(
                beta[..., None] * jnp.tril(overlap, -1), beta[..., None] * (v - expected)
            )
        out = jnp.einsum("...tk,...tkv->...tv", q * since, S) + scores @ written
        last = fades[..., -1, :, :] * k
        S = since[..., -1, :, None] * S[..., -1, :, :]
        S = S + jnp.einsum("...tk,...tv->...kv", last, written)
    m = None
    if options.normalize:
        sums = jnp.sum(q * since * n, -1) + jnp.sum(scores * weight[..., None, :], -1)
        out = out / jnp.maximum(jnp.abs(sums), 1)[..., None]
        n = since[..., -1, :] * n[..., -1, :] + jnp.sum(last * weight[..., None], -2)
        m = jnp.zeros(n.shape[:-1], wide)
    return jnp.moveaxis(out, 3, 2).astype(inputs.v.dtype), NormalizedState(S, n, m)


def _substitute(a: Array, right: Array) -> Array:
    """x of (I + a) x = right, row by row, for strictly lower triangular `a`."""

    def step(x, i):
        row = right[..., i, :] - jnp.einsum("...j,...jv->...v", a[..., i, :], x)
        return x.at[..., i, :].set(row), None

    return jax.lax.scan(step, jnp.zeros_like(right), jnp.arange(a.shape[-1]))[0]


def _found(options, inputs, documents):
    """Matrix and normalizer that each token's document started from, `[N, P, H, T, ...]`."""
    begin, again = initial_state(options, inputs), restart_state(options, inputs)
    found = []
    for first, other in zip(begin[:2], again[:2], strict=True):
        if first is None:
            found.append(None)
            continue
        if options.normalize:
            first = first * _like(jnp.exp(begin.maximum), first)
            other = other * _like(jnp.exp(again.maximum), other)
        first, other = first[:, :, :, None], other[:, :, :, None]
        found.append(jnp.where(_like(documents == 0, first), first, other))
    return found


def _like(x: Array, y: Array) -> Array:
    """`x` with axes of size 1 at the end, as many as `y` has axes."""
    return x.reshape(*x.shape, *[1] * (y.ndim - x.ndim))
