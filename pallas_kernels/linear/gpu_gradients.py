"""What the backward passes of the GPU kernels of linear attention share, computed by XLA."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.linear.options import Inputs


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


def row_products(x: Float[Array, "b Hn hv hk"], y: Array) -> Float[Array, "b Hn hk"]:
    """The sums of x y over the rows, for the gradient of a factor of the columns."""
    return jnp.einsum("bnvk,bnvk->bnk", x.astype(jnp.float32), y.astype(jnp.float32))


def times_states(x: Float[Array, "b T H hv"], states, chunk: int) -> Float[Array, "b T H hk"]:
    """The product of each token with the state `[b, H n, hv, hk]` of its chunk, float32."""
    (b, T, H, hv), hk = x.shape, states.shape[-1]
    products = jnp.einsum(
        "bnchv,bhnvk->bnchk",
        x.reshape(b, -1, chunk, H, hv),
        states.reshape(b, H, -1, hv, hk),
        preferred_element_type=jnp.float32,
    )
    return products.reshape(b, T, H, hk)


def restart_gradients(
    state: Float[Array, "P H hv hk"],
    factors: Float[Array, "b Hn hk"],
    dstates: Float[Array, "b Hn hv hk"],
    q: Float[Array, "b T K hk"],
    dout: Float[Array, "b T H hv"],
) -> tuple[Float[Array, "P H hk hv"], Float[Array, "b Hn hk"]]:
    """Of the state that documents start from, and of `factors`.

    Args:
      factors: of the state in those after each chunk.
      dstates: gradients of these.
      q, dout: queries, and what of the outputs' gradients is for this state.
    """
    (P, H, hv, hk), (b, T, K, _) = state.shape, q.shape
    split = lambda x: x.reshape(b // P, P, H, -1, *x.shape[2:])
    dstates = split(dstates.astype(jnp.float32))
    by_queries = jnp.einsum(
        "bptkgv,bptkd->pkgdv",
        dout.reshape(b // P, P, T, K, H // K, hv),
        q.reshape(b // P, P, T, K, hk),
        preferred_element_type=jnp.float32,
    )
    later = jnp.einsum("bphnvk,bphnk->phkv", dstates, split(factors))
    of_factors = jnp.einsum("bphnvk,phvk->bphnk", dstates, state.astype(jnp.float32))
    return by_queries.reshape(P, H, hk, hv) + later, of_factors.reshape(factors.shape)


def plus_states(gradients: Inputs, initial: Float[Array, "N P H hk hv"], restart) -> Inputs:
    """With these gradients of the matrices added, where there are any."""
    state = gradients.initial
    if state is not None:
        axes = () if state.matrix.shape[0] == initial.shape[0] else (0,)
        matrix = state.matrix + jnp.sum(initial, axes, keepdims=True)
        gradients = gradients._replace(initial=state._replace(matrix=matrix))
    state = gradients.restart
    if restart is not None:
        gradients = gradients._replace(restart=state._replace(matrix=state.matrix + restart))
    return gradients
