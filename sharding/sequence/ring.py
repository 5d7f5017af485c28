"""Ring attention (arXiv 2310.01889) over a balanced order of chunks.

The sequence is cut in 2n chunks for n devices, and device i takes chunks i and 2n-1-i, one of the
first half and one of the last: under a causal mask all devices then have the same work, in every
step. It is a zigzag: going through the chunks one goes through the devices forth and back.

Device i comes with chunks 2i and 2i+1. A device takes exactly one even and one odd chunk, since of
i and 2n-1-i one is even; so the even chunks are exchanged by one permutation, the odd ones by
another.

Keys and values then go around. Device i meets those of j = i - s in step s:

- under a causal mask, its chunk 2n-1-i of queries sees all of chunk j of keys, and besides, if
  i > j, its chunk i sees all of chunk j, otherwise chunk 2n-1-i all of chunk 2n-1-j: two pairs of
  chunks in every step. In step 0 two of three pairs are on the diagonal, where half is seen.
- otherwise all four pairs, of which the kernel skips the tiles that nobody sees.

The parts of a softmax are merged by their log-sum-exp. The backward pass goes around once more and
computes the parts again, so that a device never holds more keys than two devices' worth; their
gradients go along with them, in float32, one step behind.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import attention
from pallas_kernels.linear.aaren import AarenState, merge_parts
from pallas_kernels.masks import Mask
from sharding import sequence
from sharding.sequence import masks as sequence_masks

LOW, HIGH = 0, 1  # which of a device's two chunks


def ring_attention(parts: int, options: dict, q: Array, k: Array, v: Array, mask: Mask, prefix):
    """Attention of each device's queries to the keys of all, within `shard_map`.

    Args:
      parts: devices n along the axis, at least 2.
      options: of `attention`.
      q, k, v: the device's consecutive part, an even number of positions.
      mask: of the whole sequence.
      prefix: as for `attention`, or None.

    Returns:
      like q.
    """
    axis = q.ndim - 3
    q, k, v = (to_zigzag(x, parts, axis) for x in (q, k, v))
    static = (parts, tuple(sorted(options.items())), mask.causal)
    return from_zigzag(_ring(static, q, k, v, mask, prefix), parts, axis)


def owner(chunk: int, parts: int) -> int:
    """The device that has a chunk."""
    return min(chunk, 2 * parts - 1 - chunk)


def chunk_of(half, device, parts: int):
    """The chunk that is the LOW or HIGH one of a device."""
    return device + half * (2 * parts - 1 - 2 * device)


def pairs(step, device, parts: int, causal: bool) -> list:
    """The pairs of chunks that a device computes in a step after the first.

    Args:
      step: s, from 1; the keys are of device (device - s) % parts.

    Returns:
      pairs of halves, of queries and of keys; numbers if `step` and `device` are.
    """
    if not causal:
        return [(LOW, LOW), (LOW, HIGH), (HIGH, LOW), (HIGH, HIGH)]
    # LOW queries see LOW keys of the devices before; HIGH ones see HIGH keys of those behind.
    behind = (step > device) * 1
    return [(HIGH, LOW), (behind, behind)]


def own_pairs(causal: bool) -> list[tuple[int, int]]:
    """Those of the first step, with a device's own keys."""
    return pairs(0, 0, 1, False) if not causal else [(LOW, LOW), (HIGH, LOW), (HIGH, HIGH)]


def to_zigzag(x: Array, parts: int, axis: int) -> Float[Array, "2 ..."]:
    """A device's two chunks, LOW and HIGH, given its consecutive part of the sequence."""
    received = [
        jax.lax.ppermute(half, sequence.AXIS, _route(parts, odd))
        for odd, half in enumerate(jnp.split(x, 2, axis))
    ]
    return _swap_if_odd(jnp.stack(received))


def from_zigzag(x: Float[Array, "2 ..."], parts: int, axis: int) -> Array:
    """The inverse of `to_zigzag`."""
    halves = [
        jax.lax.ppermute(half, sequence.AXIS, [(b, a) for a, b in _route(parts, odd)])
        for odd, half in enumerate(_swap_if_odd(x))
    ]
    return jnp.concatenate(halves, axis)


def _route(parts, odd):
    return [(device, owner(2 * device + odd, parts)) for device in range(parts)]


def _swap_if_odd(x):
    """On devices of odd index the LOW chunk is the odd one."""
    return jnp.where(jax.lax.axis_index(sequence.AXIS) % 2 == 1, x[::-1], x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(static, q, k, v, mask, prefix):
    return _forward(static, q, k, v, mask, prefix)[0]


def _forward(static, q, k, v, mask, prefix):
    parts, _, causal = static
    nothing = AarenState(
        jnp.full(q.shape[:-1], -jnp.inf, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )

    def see(state, pair, step, kv, own=False):
        a, b = pair
        see_pair = _pair(static, mask, pair, step, own)
        out, lse = see_pair(_at(q, a), *(_at(x, b) for x in kv), _own_prefix(prefix, pair, own))
        seen = AarenState(lse, jnp.ones_like(lse), out.astype(jnp.float32))
        before = jax.tree.map(lambda x: _at(x, a), state)
        return jax.tree.map(lambda x, new: _put(x, new, a), state, merge_parts(before, seen))

    def others(step, kv, state):
        for pair in pairs(step, jax.lax.axis_index(sequence.AXIS), parts, causal):
            state = see(state, pair, step, kv)
        return state

    def body(carry, step):
        kv, state = carry
        return (_pass_on(kv, parts), others(step, kv, state)), None

    kv, state = _pass_on((k, v), parts), nothing
    for pair in own_pairs(causal):
        state = see(state, pair, 0, (k, v), own=True)
    if parts > 2:
        (kv, state), _ = jax.lax.scan(body, (kv, state), jnp.arange(1, parts - 1))
    state = others(parts - 1, kv, state)
    sees = state.total > 0.0
    total = jnp.where(sees, state.total, 1.0)
    out = (state.weighted / total[..., None]).astype(q.dtype)
    lse = jnp.where(sees, state.maximum + jnp.log(total), -jnp.inf)
    return out, (q, k, v, mask, prefix, out, lse)


def _backward(static, saved, dout):
    q, k, v, mask, prefix, out, lse = saved
    parts, _, causal = static
    dout = dout.astype(jnp.float32)
    delta = jnp.sum(dout * out.astype(jnp.float32), -1)
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), tree)

    def pull(grads, pair, step, kv, own=False):
        """Adds the gradients of what a pair of chunks gives."""
        (a, b), (dq, dkv, dprefix) = pair, grads
        see_pair = _pair(static, mask, pair, step, own)
        slots = _own_prefix(prefix, pair, own)
        (part, part_lse), vjp = jax.vjp(see_pair, _at(q, a), *(_at(x, b) for x in kv), slots)
        # The output is the sum of the parts times these weights; so is its gradient.
        base = _at(lse, a)
        weight = jnp.exp(part_lse - jnp.where(base > -jnp.inf, base, jnp.inf))
        d = _at(dout, a)
        dlse = weight * (jnp.sum(d * part.astype(jnp.float32), -1) - _at(delta, a))
        dq_a, dk_b, dv_b, dslots = vjp(((weight[..., None] * d).astype(part.dtype), dlse))
        dq = _put(dq, _at(dq, a) + dq_a, a)
        dkv = tuple(_put(x, _at(x, b) + dx, b) for x, dx in zip(dkv, (dk_b, dv_b), strict=True))
        if slots is not None:
            dprefix = jax.tree.map(jnp.add, dprefix, dslots)
        return dq, dkv, dprefix

    def others(step, kv, dq):
        grads = (dq, zeros(kv), None)
        for pair in pairs(step, jax.lax.axis_index(sequence.AXIS), parts, causal):
            grads = pull(grads, pair, step, kv)
        return grads[:2]

    def add_others(step, kv, dkv, dq):
        # What comes with the keys is not waited for before their own gradients are computed.
        dkv = _pass_on(dkv, parts)
        dq, added = others(step, kv, dq)
        return jax.tree.map(jnp.add, dkv, added), dq

    def body(carry, step):
        kv, dkv, dq = carry
        return (_pass_on(kv, parts), *add_others(step, kv, dkv, dq)), None

    kv, grads = _pass_on((k, v), parts), (zeros(q), zeros((k, v)), zeros(prefix))
    for pair in own_pairs(causal):
        grads = pull(grads, pair, 0, (k, v), own=True)
    dq, dkv, dprefix = grads
    if parts > 2:
        (kv, dkv, dq), _ = jax.lax.scan(body, (kv, dkv, dq), jnp.arange(1, parts - 1))
    dkv, dq = add_others(parts - 1, kv, dkv, dq)
    dk, dv = _pass_on(dkv, parts)
    narrow = lambda x, like: x.astype(like.dtype)
    dprefix = jax.tree.map(narrow, dprefix, prefix)
    return narrow(dq, q), narrow(dk, k), narrow(dv, v), None, dprefix


_ring.defvjp(_forward, _backward)


def _pair(static, mask, pair, step, own):
    """Attention of one chunk of queries to one of keys: output and log-sum-exp."""
    parts, options, _ = static
    device = jax.lax.axis_index(sequence.AXIS)
    diagonal = own and pair[0] == pair[1]

    def see(q, k, v, prefix):
        size = q.shape[-3]
        first = [
            size * chunk_of(half, of, parts)
            for half, of in zip(pair, (device, (device - step) % parts), strict=True)
        ]
        part = _without_causal(mask) if not diagonal else mask
        part, k, v = sequence_masks.part(part, size, first[0], k, v, first[1], diagonal=diagonal)
        return attention(q, k, v, part, prefix=prefix, return_lse=True, **dict(options))

    return see


def _without_causal(mask):
    """For keys that are all before the queries."""
    return Mask(mask.intervals, False, mask.dilation)


def _own_prefix(prefix, pair, own):
    """The prefix for one pair of each chunk of queries, so that it counts once."""
    return prefix if own and pair[0] == pair[1] else None


def _pass_on(tree, parts):
    """What the device before has."""
    route = [(device, (device + 1) % parts) for device in range(parts)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, sequence.AXIS, route), tree)


def _at(x, half):
    return jax.lax.dynamic_index_in_dim(x, half, 0, keepdims=False)


def _put(x, new, half):
    return jax.lax.dynamic_update_index_in_dim(x, new, half, 0)
