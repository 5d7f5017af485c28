"""Which mesh axes a collective goes over, read from its groups of devices."""

import itertools
import math
import re

import numpy as np

_IOTA = r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
_SPLIT_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def groups(text: str, devices: int) -> np.ndarray:
    """Rows of devices that talk to each other, from the text of `replica_groups`.

    XLA writes it in three forms: `{{0,1},{2,3}}`, `[2,2]<=[2,2]T(1,0)`, and
    `mesh['x'=2,'y'=2] {'x'}`, each axis perhaps a part of one, `'x':(2)4`.

    Args:
      text: the attribute; nothing or `{}` is one group of all.
      devices: how many there are.

    Raises:
      ValueError: another form.
    """
    text = text.strip()
    if text in ("", "{}"):
        return np.arange(devices)[None]
    if text.startswith("{{"):
        rows = [row.split(",") for row in re.findall(r"\{([\d,\s]+)\}", text)]
        return np.array(rows, int)
    iota = re.fullmatch(_IOTA, text)
    if iota:
        return _iota(iota).reshape(_ints(iota[1]))
    mesh = re.fullmatch(r"@?mesh\[([^\]]*)\](?:,\s*device_ids=\((.*?)\))?\s*\{(.*)\}", text)
    if not mesh:
        raise ValueError(f"replica_groups={text}: not a form that is known")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
    order = np.arange(math.prod(sizes.values()))
    if mesh[2]:
        found = re.fullmatch(_IOTA, mesh[2])
        # The device list's own iota leaves out what it is an iota of.
        short = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", mesh[2])
        if short:
            order = order.reshape(_ints(short[1])).transpose(_ints(short[2])).ravel()
        else:
            order = _iota(found).ravel() if found else np.array(_ints(mesh[2]))
    return _along(order, sizes, _SPLIT_AXIS.findall(mesh[3]))


def _along(order: np.ndarray, sizes: dict[str, int], wanted: list[tuple]) -> np.ndarray:
    """Rows along the wanted axes, of which some are a part `(before)size` of a whole one."""
    shape, chosen, place = [], {}, 0
    for name, size in sizes.items():
        part = [(int(before or 1), int(part or size)) for n, before, part in wanted if n == name]
        cuts = [1]
        for before, length in sorted(part):
            cuts += [before, before * length]
        cuts = sorted({*cuts, size})
        for low, high in itertools.pairwise(cuts):
            if (low, high // low) in part:
                chosen[name, low] = place
            shape.append(high // low)
            place += 1
    last = [chosen[name, int(before or 1)] for name, before, part in wanted if sizes[name] > 1]
    first = [axis for axis in range(place) if axis not in last]
    columns = math.prod(shape[axis] for axis in last)
    return order.reshape(shape).transpose(first + last).reshape(-1, columns)


def _iota(found: re.Match) -> np.ndarray:
    shape = _ints(found[2])
    order = _ints(found[3]) if found[3] else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order)


def _ints(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def pairs(text: str) -> np.ndarray:
    """Rows of source and target, from the text of `source_target_pairs`."""
    return np.array([row.split(",") for row in re.findall(r"\{(\d+,\s*\d+)\}", text)], int)


def axes_of(rows: np.ndarray, shape: dict[str, int]) -> tuple[str, ...]:
    """Mesh axes along which the devices of any row differ.

    Args:
      rows: numbers of devices in the order of the mesh, the last axis fastest.
      shape: the size of each mesh axis.
    """
    places = np.array(np.unravel_index(rows, tuple(shape.values())))
    differs = (places != places[:, :, :1]).any((1, 2))
    return tuple(axis for axis, differ in zip(shape, differs, strict=True) if differ)
