"""Nested dicts of arrays, as the weights of a model are held outside of it."""

from typing import Any

import jax.numpy as jnp

Tree = dict[str, Any]


def overlay(fresh: Tree, given: Tree) -> Tree:
    """`fresh` with the arrays of `given` in place of its own, where there are any.

    An array smaller than the fresh one takes the first places along each axis.
    """

    def place(name: str) -> Any:
        value, old = fresh[name], given.get(name)
        if isinstance(value, dict):
            return overlay(value, old or {})
        if old is None or old.shape == value.shape:
            return value if old is None else old
        return jnp.asarray(value).at[tuple(map(slice, old.shape))].set(old)

    return {name: place(name) for name in fresh}


def select(tree: Tree, like: Tree) -> Tree:
    """The part of `tree` that has the names of `like`."""
    return {
        name: select(tree[name], value) if isinstance(value, dict) else tree[name]
        for name, value in like.items()
    }


def merge(first: Tree, second: Tree) -> Tree:
    """Two trees with no leaf in common, in one."""
    merged = dict(first)
    for name, value in second.items():
        merged[name] = merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged
