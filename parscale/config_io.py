"""Configurations as dictionaries, JSON files and flat names; what may change when a run resumes."""

import dataclasses
import difflib
import json
import math
import os
import pathlib
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

from sharding.settings import InputError, nearest

C = TypeVar("C")

EXPECTED = {int: "an integer", float: "a finite number", bool: "true or false", str: "text"}


class Leaf(typing.NamedTuple):
    """One field that holds a value: its dotted name, its type, and the field with its metadata."""

    name: str
    kind: Any
    field: dataclasses.Field


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Every field of a tree of configuration classes that is not a configuration itself."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from leaves(kind, f"{prefix}{field.name}.")
        else:
            yield Leaf(prefix + field.name, kind, field)


def nearest_name(name: str, names: Iterable[str]) -> str:
    """` (did you mean "..."?)`: a slip in the last part, a namesake, or the closest.

    A namesake has the same last part, in another section.
    """
    section, dot, last = name.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in names if known.rpartition(".")[0] == section]
    slips = difflib.get_close_matches(last, siblings, n=1, cutoff=0.8)
    found = [section + dot + slip for slip in slips]
    found += [known for known in names if known.rpartition(".")[2] == last]
    return f' (did you mean "{found[0]}"?)' if found else nearest(name, names)


def expected(kind: Any) -> str:
    """What a value of this type is called in a message."""
    if typing.get_origin(kind) is tuple:
        return f"a list, each {expected(typing.get_args(kind)[0])}"
    return EXPECTED[kind]


def convert(kind: Any, value: Any) -> Any:
    """`value` as the type of a field: int, float, bool, str or a tuple of one of them.

    An integer will do for a float and a list for a tuple; nothing else changes type.

    Raises:
      ValueError: `value` is of another type, or a number that is not finite.
    """
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list | tuple):
            return tuple(convert(typing.get_args(kind)[0], item) for item in value)
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
    elif type(value) is kind:
        return value
    raise ValueError(f"expected {expected(kind)}")


def parse(kind: Any, text: str) -> Any:
    """The value that a person wrote; the parts of a tuple are separated by commas.

    Raises:
      ValueError: `text` does not read as this type.
    """
    if typing.get_origin(kind) is tuple:
        return tuple(parse(typing.get_args(kind)[0], part) for part in text.split(",") if part)
    if kind is bool:
        known = {"true": True, "1": True, "false": False, "0": False}
        value = known.get(text.lower())
    elif kind is str:
        value = text
    else:
        try:
            value = kind(text)
        except ValueError:
            value = None
    return convert(kind, value)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every value by its dotted name: `{"model.streams": 4, ...}`."""
    flat = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{field.name}.")
        else:
            flat[prefix + field.name] = value
    return flat


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dictionaries of plain values."""
    return dataclasses.asdict(config)


def from_dict(cls: type[C], values: Mapping[str, Any], prefix: str = "") -> C:
    """The configuration that `to_dict` described; fields that are not there take their defaults.

    Args:
      cls: the configuration class.
      values: values by field name, nested as the classes are.
      prefix: dotted name of this section, with its dot, for messages.

    Raises:
      InputError: an unknown name, a wrong type, or a value that the configuration refuses.
    """
    hints = typing.get_type_hints(cls)
    names = [prefix + field.name for field in dataclasses.fields(cls)]
    found = {}
    for key, value in values.items():
        name = prefix + key
        if name not in names:
            raise InputError(f"{name}: no such configuration field{nearest(name, names)}")
        kind = hints[key]
        if not dataclasses.is_dataclass(kind):
            try:
                found[key] = convert(kind, value)
            except ValueError as error:
                raise InputError(f"{name}={value!r}: {error}") from None
        elif isinstance(value, Mapping):
            found[key] = from_dict(kind, value, name + ".")
        else:
            raise InputError(f"{name}={value!r}: expected a section with fields of its own")
    return cls(**found)


def replace(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with other values at these dotted names, checked as a whole.

    Raises:
      InputError: an unknown name, a wrong type, or a value that the configuration refuses.
    """
    names = [leaf.name for leaf in leaves(type(config))]
    values = to_dict(config)
    for name, value in changes.items():
        if name not in names:
            raise InputError(f"{name}: no such configuration field{nearest_name(name, names)}")
        *sections, last = name.split(".")
        section = values
        for key in sections:
            section = section[key]
        section[last] = value
    return from_dict(type(config), values)


def to_json(config: Any, path: str | os.PathLike) -> None:
    """Writes `config` to a file; whoever reads it finds the old one or the new one, whole."""
    path = pathlib.Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(to_dict(config), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def from_json(cls: type[C], path: str | os.PathLike) -> C:
    """The configuration in a file that `to_json` wrote.

    Raises:
      InputError: no such file, not JSON, or not a configuration of this class.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a configuration in JSON ({error})") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object of sections")
    try:
        return from_dict(cls, values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def check_resumable(saved: C, now: C, grow: bool = False) -> None:
    """Raises InputError if a run of `saved` may not go on as `now`, naming every field in the way.

    Args:
      saved: the configuration in the workdir.
      now: the one that is asked for.
      grow: whether growable fields may be raised (they may never be lowered).
    """
    old, new = flatten(saved), flatten(now)
    refused = []
    for name, _, field in leaves(type(now)):
        resume = field.metadata["resume"]
        if old[name] == new[name] or resume == "free":
            continue
        difference = f"{name}: {old[name]} in the workdir, {new[name]} now"
        if resume == "growable" and new[name] > old[name]:
            if grow:
                continue
            difference += f" (--grow_{field.name} would allow it)"
        elif resume == "growable":
            difference += " (it can only grow)"
        refused.append(difference)
    if refused:
        raise InputError(
            "the run in this workdir has another configuration: "
            + "; ".join(refused)
            + ". Go back to the old value, or give another --workdir"
        )
