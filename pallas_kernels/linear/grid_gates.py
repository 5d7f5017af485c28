"""Gates of pLSTM on a grid, and two ways to make them so that nothing grows with its size.

From one node to another lead as many paths as there are orders of going right and down; free
transitions of 1 would add them all up. Source: arXiv 2506.11997.
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class GridGates(NamedTuple):
    """The gates of every node, each `[*lead, Y, X, H]`; Y rows from the top, X columns.

    Attributes:
      source_right, source_down: S of the edges that leave to the right and downwards.
      right_from_left, right_from_up, down_from_left, down_from_up: T, from an edge that enters to
        an edge that leaves.
      mark_left, mark_up: M of the edges that enter.
      direct: D.
    """

    source_right: Float[Array, "*lead Y X H"]
    source_down: Float[Array, "*lead Y X H"]
    right_from_left: Float[Array, "*lead Y X H"]
    right_from_up: Float[Array, "*lead Y X H"]
    down_from_left: Float[Array, "*lead Y X H"]
    down_from_up: Float[Array, "*lead Y X H"]
    mark_left: Float[Array, "*lead Y X H"]
    mark_up: Float[Array, "*lead Y X H"]
    direct: Float[Array, "*lead Y X H"]


def directed_gates(
    share: Float[Array, "*lead Y X H"],
    source: Float[Array, "*lead Y X H"],
    transition: Float[Array, "*lead Y X H"],
    mark: Float[Array, "*lead Y X H"],
    direct: Float[Array, "*lead Y X H"],
) -> GridGates:
    """Gates of directed propagation (P-mode): what comes to a node goes on in one direction.

    What leaves a node is at most what enters it, times `transition`: no growth from the number of
    paths.

    Args:
      share: gamma, from 0 to 1: what part leaves to the right; the rest leaves downwards.
      source, mark, direct: S, M and D.
      transition: T, from 0 to 1.
    """
    rest = 1.0 - share
    right, down = share * transition, rest * transition
    return GridGates(share * source, rest * source, right, right, down, down, mark, mark, direct)


def diffusive_gates(
    source_right: Float[Array, "*lead Y X H"],
    source_down: Float[Array, "*lead Y X H"],
    right: Float[Array, "*lead Y X H"],
    down: Float[Array, "*lead Y X H"],
    turn: Float[Array, "*lead Y X H"],
    mark_left: Float[Array, "*lead Y X H"],
    mark_up: Float[Array, "*lead Y X H"],
    direct: Float[Array, "*lead Y X H"],
    chirality: Literal["right", "left"] = "right",
) -> GridGates:
    """Gates of diffusive distribution (D-mode): what travels goes straight on, and also turns.

    It can turn once only: there is one path between two edges, so nothing grows.

    Args:
      source_right, source_down, mark_left, mark_up, direct: S, M and D.
      right, down, turn: T of going on to the right, of going on downwards, and of turning, from -1
        to 1.
      chirality: "right" turns from right to down, "left" from down to right.
    """
    if chirality not in ("right", "left"):
        raise ValueError(f"chirality={chirality!r}: expected right or left")
    none = jnp.zeros_like(turn)
    to_right, to_down = (none, turn) if chirality == "right" else (turn, none)
    return GridGates(
        source_right, source_down, right, to_right, to_down, down, mark_left, mark_up, direct
    )
