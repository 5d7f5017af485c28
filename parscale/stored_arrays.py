"""One step's folder of a checkpoint: what it holds, and its arrays read into a wanted form.

Paths name arrays: tuples of strings, in which NamedTuple fields, list positions and dictionary
keys look alike, because that is all that is stored of a tree's structure.
"""

import contextlib
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from sharding.settings import InputError

RECORD = "record"
SCALARS = "scalars"
Paths = dict[tuple[str, ...], Any]


def to_items(state: Mapping[str, Any]) -> dict[str, Any]:
    """The items that a state is stored as: its entries that have arrays; lone arrays share one."""
    trees = {name: tree for name, tree in state.items() if jax.tree.leaves(tree)}
    alone = {name: tree for name, tree in trees.items() if jax.tree_util.all_leaves([tree])}
    items = {name: tree for name, tree in trees.items() if name not in alone}
    return items | ({SCALARS: alone} if alone else {})


def from_items(items: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """`items` as entries again; entries without arrays are taken from `state`."""
    trees = {name: tree for name, tree in items.items() if name != SCALARS}
    return {**state, **trees, **items.get(SCALARS, {})}


def save_args(state: Mapping[str, Any], record: Mapping[str, Any]) -> ocp.args.Composite:
    """What orbax is to write for a state and the JSON dictionary beside it."""
    items = {name: ocp.args.StandardSave(tree) for name, tree in to_items(state).items()}
    return ocp.args.Composite(**items, **{RECORD: ocp.args.JsonSave(dict(record))})


def stored_items(folder: Path, names: Container[str] | None = None) -> dict[str, Paths]:
    """Item name -> path -> `jax.ShapeDtypeStruct` (without a sharding), read without the arrays.

    Args:
      folder: of the step.
      names: of the items that are looked at; None: all.
    """
    handler = ocp.PyTreeCheckpointHandler()
    return {
        path.name: {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for name, leaf in flatten(handler.metadata(path).tree).items()
        }
        for path in sorted(folder.iterdir())
        if path.is_dir() and path.name != RECORD and (names is None or path.name in names)
    }


def read_arrays(folder: Path, item: str, wanted: Paths) -> Paths:
    """Some of the arrays of one item; the others are not read.

    Args:
      folder: of the step.
      item: its name.
      wanted: path -> `jax.ShapeDtypeStruct` with the stored shape and dtype; one with a sharding
        becomes a `jax.Array`, others NumPy arrays.
    """
    handler = ocp.PyTreeCheckpointHandler()
    # The stored structure, with a placeholder for what is not wanted.
    structure = handler.metadata(folder / item).tree
    leaves = [wanted.get(path, ocp.PLACEHOLDER) for path in flatten(structure)]
    target = jax.tree.unflatten(jax.tree.structure(structure), leaves)
    args = ocp.args.PyTreeRestore(item=target, restore_args=jax.tree.map(_restore_args, target))
    with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
        read = flatten(checkpointer.restore(folder / item, args=args))
    return {path: leaf for path, leaf in read.items() if path in wanted}


def read_record(folder: Path) -> dict[str, Any]:
    """The JSON dictionary saved beside the arrays."""
    with contextlib.closing(ocp.Checkpointer(ocp.JsonCheckpointHandler())) as checkpointer:
        return checkpointer.restore(folder / RECORD)


def check_same(
    folder: Path, what: str, stored: Paths, wanted: Paths, partial: bool = False
) -> None:
    """Raises InputError that names the arrays in which `stored` and `wanted` differ."""
    differences = {
        "missing": [path for path in wanted if path not in stored],
        "not expected": [path for path in stored if path not in wanted and not partial],
    }
    lines = [f"{word}: {listed(map(_name, paths))}" for word, paths in differences.items() if paths]
    changed = [
        f"{_name(path)} is {_kind(stored[path])} instead of {_kind(leaf)}"
        for path, leaf in wanted.items()
        if path in stored and _kind(stored[path]) != _kind(leaf)
    ]
    if changed:
        lines.append(listed(changed))
    if lines:
        raise InputError(
            f"checkpoint {folder} does not fit, in its {what}: {'; '.join(lines)}; "
            "use the configuration that it was written with"
        )


def flatten(tree: Any) -> Paths:
    """Path -> leaf, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {tuple(map(_word, path)): leaf for path, leaf in leaves}


def unflatten(paths: Paths, like: Any) -> Any:
    """Path -> leaf in the structure of `like`, whose paths they are."""
    return jax.tree.unflatten(jax.tree.structure(like), [paths[path] for path in flatten(like)])


def nest(paths: Paths) -> dict[str, Any]:
    """Path -> leaf as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, leaf in paths.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def listed(names: Iterable[Any], most: int = 6) -> str:
    """The first few names for a message, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "nothing"


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if getattr(leaf, "sharding", None) is None:
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape)


def _word(key: Any) -> str:
    return str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key))))


def _name(path: tuple[str, ...]) -> str:
    return "/".join(path)


def _kind(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
