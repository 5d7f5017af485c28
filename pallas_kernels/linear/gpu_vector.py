"""Linear attention whose keys' dimensions decay each for itself, by the GPU kernels.

Queries and keys are multiplied with the decays to their chunk's borders, and the products of pairs
are computed by halves (`pallas_kernels.linear.pairs`), both by XLA; the recurrence and the sums
over values are the kernels' work.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear import gpu_outputs, gpu_states
from pallas_kernels.linear.gates import in_chunks, make_rows
from pallas_kernels.linear.gpu_gradients import (
    Saved,
    plus_states,
    restart_gradients,
    row_products,
    times_states,
)
from pallas_kernels.linear.gpu_layout import from_chunks, tokens, turned, untokens, unturned, wide
from pallas_kernels.linear.gpu_outputs import OutputInputs
from pallas_kernels.linear.gpu_prepare import solve
from pallas_kernels.linear.gpu_states import StateInputs
from pallas_kernels.linear.options import Inputs, Options
from pallas_kernels.linear.pairs import decayed_products


class PreparedKeys(NamedTuple):
    """Float32, with whole chunks. None: not needed.

    Attributes:
      weights: `[b, T, H, C]`, of the values of a query's chunk in its output.
      entering, restarting: `[b, T, H, hk]`, queries by what they find of the state before their
        chunk and of the one that documents start from.
      leaving: `[b, T, H, hk]`, keys by what stays of them in the state after the chunk.
      keep, again, written, found: as in `gpu_prepare.Prepared`.
    """

    weights: Float[Array, "b T H C"]
    entering: Float[Array, "b T H hk"]
    restarting: Float[Array, "b T H hk"] | None
    leaving: Float[Array, "b T H hk"]
    keep: Float[Array, "b Hn hk"]
    again: Float[Array, "b Hn hk"] | None
    written: Float[Array, "b T H hv"] | None
    found: Float[Array, "b T H hk"] | None


def prepare(options: Options, inputs: Inputs) -> PreparedKeys:
    """Of float32 inputs."""
    rows = make_rows(options, inputs)
    H, K = inputs.v.shape[3], inputs.k.shape[3]
    q, k = (
        jnp.repeat(jnp.moveaxis(in_chunks(x, options.chunk), 3, 4), H // K, axis=3)
        for x in (inputs.q * options.scale, inputs.k)
    )
    delta = inputs.beta is not None
    products = decayed_products((q, k) if delta else (q,), k, rows.total)
    if rows.documents is not None:
        seen = rows.documents[..., :, None] == rows.documents[..., None, :]
        products = [jnp.where(seen, x, 0.0) for x in products]
    has_restart = rows.restart is not None
    weights, leaving, written, found = products[0], k * rows.leave, None, None
    if delta:
        restarting = rows.restart * k if has_restart else None
        written, found = solve(options, inputs, rows, products[1], rows.enter * k, restarting)
    elif rows.weight is not None:
        weights = weights * rows.weight[..., None, :]
        leaving = leaving * rows.weight[..., None]

    def by_key(x):
        """`[n, N, P, H, hk]` as `[b, H n, hk]`."""
        n, N, P, H, hk = x.shape
        return jnp.moveaxis(x, 0, 3).reshape(N * P, H * n, hk)

    return PreparedKeys(
        weights=from_chunks(weights),
        entering=from_chunks(q * rows.enter),
        restarting=from_chunks(q * rows.restart) if has_restart else None,
        leaving=from_chunks(leaving),
        keep=by_key(rows.keep),
        again=by_key(rows.keep_restart) if has_restart else None,
        written=written,
        found=found,
    )


def forward(options: Options, inputs: Inputs):
    """As `gpu_scalar.forward`."""
    prepared = _narrow(prepare(options, wide(inputs)), inputs)
    P, H = inputs.v.shape[1], inputs.v.shape[3]
    v = tokens(inputs.v, options.chunk)
    has_restart = prepared.restarting is not None
    run = gpu_states.call(
        StateInputs(
            prepared.leaving,
            v if prepared.written is None else prepared.written,
            None,
            prepared.keep,
            None if inputs.initial is None else turned(inputs.initial.matrix),
            (prepared.again, turned(inputs.restart.matrix).astype(v.dtype))
            if has_restart
            else None,
            prepared.found,
        ),
        P,
    )
    written = run.get("X")
    states = {"state": run["states"]}
    if has_restart:
        states["restart"] = inputs.restart.matrix.mT.astype(v.dtype)
    found = gpu_outputs.call(
        OutputInputs(
            prepared.entering,
            None,
            v if written is None else written,
            None,
            None,
            states,
            weights=prepared.weights,
            q_restart=prepared.restarting,
        ),
        H,
        options.chunk,
        1.0,
    )
    return found["out"], run["end"], None, None, Saved(run["states"], None, written)


def backward(options: Options, inputs: Inputs, out, saved: Saved, dout, dend) -> Inputs:
    """As `gpu_scalar.backward`."""
    documents, C = inputs.documents, options.chunk
    prepared, pull = jax.vjp(
        lambda x: prepare(options, x._replace(documents=documents)),
        wide(inputs)._replace(documents=None),
    )
    narrow = _narrow(prepared, inputs)
    P, H = inputs.v.shape[1], inputs.v.shape[3]
    dout, last = tokens(dout, C).astype(inputs.q.dtype), turned(dend.matrix)

    def by_values(states):
        """The gradient of values, by the outputs of their chunk and these states' gradients."""
        arrays = OutputInputs(
            narrow.leaving, None, dout, None, None, states, weights=narrow.weights
        )
        return gpu_outputs.call(arrays, H, C, 1.0, reverse=True, name="linear_dv")["out"]

    entering, leaving, keep = narrow.entering, narrow.leaving, narrow.keep
    if saved.written is None:
        v = tokens(inputs.v, C)
        arrays = StateInputs(entering, dout, None, keep, last)
        run = gpu_states.call(arrays, P, reverse=True)
        dv = by_values({"state": run["states"]})
    else:
        v = saved.written
        arrays = StateInputs(
            narrow.found, by_values({}), None, keep, last, None, leaving, (entering, dout)
        )
        run = gpu_states.call(arrays, P, reverse=True)
        dv = run["X"]
    dstates = run["states"]
    by_chunk = lambda x: x.reshape(x.shape[0], -1, C, *x.shape[2:])
    dweights = jnp.einsum(
        "bnihv,bnjhv->bnihj", by_chunk(dout), by_chunk(v), preferred_element_type=jnp.float32
    )
    cotangents = jax.tree.map(jnp.zeros_like, prepared)._replace(
        weights=dweights.reshape(prepared.weights.shape),
        entering=times_states(dout, saved.states, C),
        leaving=times_states(v, dstates, C),
        keep=row_products(dstates, saved.states),
    )
    drestart = None
    if prepared.restarting is not None:
        state = inputs.restart.matrix.mT
        drestart, again = restart_gradients(state, prepared.again, dstates, narrow.restarting, dout)
        found = jnp.einsum(
            "bpthv,phvk->bpthk",
            dout.reshape(-1, P, *dout.shape[1:]),
            state.astype(dout.dtype),
            preferred_element_type=jnp.float32,
        )
        restarting = found.reshape(prepared.restarting.shape)
        cotangents = cotangents._replace(restarting=restarting, again=again)
    if saved.written is not None:
        found = times_states(dv, saved.states, C)
        cotangents = cotangents._replace(written=dv.astype(jnp.float32), found=found)
    gradients = pull(cotangents)[0]
    if saved.written is None:
        part = untokens(dv, inputs.q).astype(jnp.float32)
        gradients = gradients._replace(v=gradients.v + part)
    return plus_states(gradients, unturned(run["end"], inputs.v), drestart)


def _narrow(prepared, inputs):
    """Operands of products in the type of the inputs."""
    factors = {"keep": prepared.keep, "again": prepared.again}
    narrow = jax.tree.map(lambda x: x.astype(inputs.q.dtype), prepared)
    return narrow._replace(**factors)
