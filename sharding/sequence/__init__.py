"""Which scheme an op uses whose positions lie over the mesh axis `sequence`.

Attention and recurrences have several schemes, which give the same results and differ in what they
move and hold. The configuration's choice is ambient while a step is traced, as the mesh is.
"""

import math
from typing import NamedTuple

import jax

from sharding.settings import InputError

AXIS = "sequence"

GATHERED_BYTES = 2**30
"""Keys and values that one device may gather for a layer: 1/16 of the smallest memory of a TPU
chip now in use, 16 GiB; their gradients take as much again. 128K tokens of two streams with 8
heads of 128 in bfloat16 come to it. Without `remat` every layer keeps its own until the backward
pass."""

STATES_GATHERED_UP_TO = 8
"""Devices up to which a recurrence gathers all states; above, each takes fewer than are gathered
and the logarithm of their number in steps."""


class Schemes(NamedTuple):
    """What `MeshConfig.sequence_attention` and `MeshConfig.sequence_state` say."""

    attention: str = "auto"
    state: str = "auto"


# Part of jit's cache key, so that a function traced for one choice is not used for another.
_schemes = jax.make_user_context(None)


def using(attention: str = "auto", state: str = "auto"):
    """A context in which ops are traced with these schemes.

    Args:
      attention: "auto", "gather", "heads" or "ring" (`sharding.sequence.attention`).
      state: "auto", "gather" or "steps" (`sharding.sequence.state`).
    """
    return _schemes(Schemes(attention, state))


def schemes() -> Schemes:
    """The ambient choice; "auto" where nothing was said."""
    return _schemes.value or Schemes()


def parts() -> int:
    """Over how many devices positions lie here: 1 without a mesh, and within `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.are_all_axes_manual:
        return 1
    return mesh.shape.get(AXIS, 1)


def attention_scheme(
    parts: int, tensor: int, heads: int, kv_heads: int, length: int, gathered: int
) -> str:
    """The scheme for attention: what was chosen, or by "auto" the first of these that can be.

    1. "heads", where the heads divide: it moves the fewest bytes with as many key heads as query
       heads, holds no more than before, and gives every device the same work. "gather" under a
       causal mask leaves the last device with nearly twice the mean, which from 4K tokens on costs
       more than the bytes it saves with few key heads.
    2. "gather", where keys and values fit (`GATHERED_BYTES`): up to some 128K tokens both are
       published at nearly twice the speed of the ring.
    3. "ring", whose memory does not grow with the number of devices.
    4. "gather" again, for lengths that the ring cannot cut.

    Args:
      parts: devices along the sequence axis.
      tensor: devices over which heads lie already.
      heads, kv_heads: H and K.
      length: T.
      gathered: bytes of keys and values that one device would gather.

    Raises:
      InputError: what was chosen cannot be for these sizes.
    """
    chosen = schemes().attention
    divides = heads % (parts * tensor) == 0 and kv_heads % (parts * tensor) == 0
    check_length(length, parts)
    if chosen == "heads" and not divides:
        raise InputError(
            f"sequence_attention=heads with {heads} query heads and {kv_heads} key/value heads: "
            f"expected both to divide over sequence={parts} x tensor={tensor} devices; "
            "change the mesh, or take sequence_attention=gather or ring"
        )
    if chosen == "ring" and length % (2 * parts):
        raise InputError(
            f"sequence_attention=ring with {length} positions: expected a multiple of "
            f"{2 * parts}, two chunks for each of sequence={parts} devices; "
            "change the length or the mesh, or take sequence_attention=gather"
        )
    if chosen != "auto":
        return chosen
    if divides:
        return "heads"
    return "gather" if gathered <= GATHERED_BYTES or length % (2 * parts) else "ring"


def state_scheme(parts: int) -> str:
    """The scheme by which the states of a recurrence pass over so many devices."""
    chosen = schemes().state
    if chosen != "auto":
        return chosen
    return "gather" if parts <= STATES_GATHERED_UP_TO else "steps"


def check_length(length: int, parts: int) -> None:
    """Raises InputError if so many positions do not divide over so many devices."""
    if length % parts:
        raise InputError(
            f"{length} positions on a mesh with sequence={parts}: expected a multiple of {parts} "
            "(soft tokens count); change the length or the mesh"
        )


def gathered_bytes(shape: tuple[int, ...], itemsize: int, shards: int) -> int:
    """Bytes of keys and values of a shape, of which other mesh axes leave a device 1/shards."""
    return 2 * math.prod(shape) * itemsize // shards
