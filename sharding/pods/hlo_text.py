"""XLA's text of a compiled program as computations of instructions."""

import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

ITEM_BYTES = {
    "pred": 1, "token": 0, "opaque": 0, "bf16": 2, "c64": 8, "c128": 16,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<= ]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$", re.DOTALL)
_COMMENT = re.compile(r"/\*.*?\*/")


class Shape(NamedTuple):
    """An array in a program: the type of its items and its dimensions."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of all items, without padding (items of 4 bits take half a byte each)."""
        bits = re.search(r"\d+", self.dtype)
        width = ITEM_BYTES.get(self.dtype, int(bits[0]) / 8 if bits else 0)
        return math.ceil(math.prod(self.dims) * width)


class Instruction:
    """One line of a computation.

    Attributes:
      name, opcode: as printed, such as `fusion.3` and `fusion`.
      result: text of its shape; a tuple's in parentheses.
      operands: text between the parentheses after the opcode.
      attributes: what follows them.
      root: whether it is the computation's result.
    """

    def __init__(self, name: str, text: str, root: bool):
        self.name = name
        self.root = root
        end = _balanced(text, 0) if text.startswith("(") else text.index(" ")
        self.result = text[:end]
        self.opcode, _, _ = text[end:].lstrip().partition("(")
        start = text.index("(", end + 1)
        end = _balanced(text, start)
        self.operands = text[start + 1 : end - 1]
        self.attributes = text[end:]

    @functools.cached_property
    def inputs(self) -> list[str]:
        """Names of the operands."""
        return re.findall(r"%([\w.\-#]+)", self.operands) or [
            word
            for word in re.split(r",\s*", self.operands)
            if re.fullmatch(r"[a-zA-Z][\w.\-]*", word)
        ]

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """Of the result; of a tuple, of every array in it."""
        return parse_shapes(self.result)

    def parts(self) -> list[list[Shape]]:
        """Of a tuple, the arrays of each of its parts, which may be tuples too."""
        return [parse_shapes(part) for part in split(self.result[1:-1])]

    def attribute(self, name: str) -> str:
        """The text of `name=...` up to the next comma outside of brackets; "" if there is none."""
        found = re.search(rf"[, ]{name}=", self.attributes)
        return split(self.attributes[found.end() :])[0] if found else ""

    def called(self, *names: str) -> list[str]:
        """Computations named by these attributes."""
        return [
            called
            for name in names
            for called in re.findall(r"[\w.\-]+", self.attribute(name).replace("%", ""))
        ]


class Computation(dict):
    """Instructions by name, in their order.

    Attributes:
      name: the computation's.
    """

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def root(self) -> Instruction:
        """The instruction whose result is the computation's."""
        return next(instruction for instruction in self.values() if instruction.root)


def parse(text: str) -> tuple[str, dict[str, Computation]]:
    """The entry's name, and all computations by name.

    An operand `%a#1`, as newer XLA prints part 1 of the tuple `a`, is an instruction of that name.

    Raises:
      ValueError: the text is not that of an HLO module.
    """
    computations, entry, current = {}, "", None
    for line in _whole_lines(text):
        head = _COMPUTATION.match(line)
        if head:
            current = computations.setdefault(head[2], Computation(head[2]))
            entry = head[2] if head[1] else entry
            continue
        found = current is not None and _INSTRUCTION.match(line)
        if found:
            body = _COMMENT.sub("", found[3])
            instruction = Instruction(found[2], body, bool(found[1]))
            for name in instruction.inputs:
                _add_part(current, name)
            current[found[2]] = instruction
    if not entry:
        raise ValueError("no ENTRY computation: not the text of a compiled program")
    return entry, computations


def _add_part(computation: Computation, name: str) -> None:
    """Adds the part of a tuple that an operand's name means, if it means one."""
    whole, mark, place = name.rpartition("#")
    if not mark or name in computation:
        return
    _add_part(computation, whole)
    shape = split(computation[whole].result[1:-1])[int(place)]
    text = f"{shape} get-tuple-element(%{whole}), index={place}"
    computation[name] = Instruction(name, text, False)


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, those of a string that spans several put together."""
    held = ""
    for line in text.split("\n"):
        held = f"{held}\n{line}" if held else line
        if (held.count('"') - held.count('\\"')) % 2:
            continue
        yield held
        held = ""


def parse_shapes(text: str) -> list[Shape]:
    """Every array's shape in the text of a result."""
    return [
        Shape(dtype, tuple(int(size.strip("<= ")) for size in dims.split(",") if size.strip()))
        for dtype, dims in _SHAPE.findall(text)
    ]


def split(text: str) -> list[str]:
    """Parts between commas that stand outside of brackets and strings."""
    parts, depth, start, quoted = [], 0, 0, False
    for place, letter in enumerate(text):
        if letter == '"' and text[place - 1] != "\\":
            quoted = not quoted
        elif quoted:
            continue
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            if depth < 0:
                return [*parts, text[start:place].strip()]
        elif letter == "," and not depth:
            parts.append(text[start:place].strip())
            start = place + 1
    return [*parts, text[start:].strip()]


def _balanced(text: str, start: int) -> int:
    """Just after the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"a parenthesis is not closed: {text[start : start + 80]}")
