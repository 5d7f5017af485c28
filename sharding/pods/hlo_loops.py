"""How often a loop of a compiled program runs, from its counter's start, step and bound."""

import re

from sharding.pods.hlo_text import Computation, Instruction

_SAME = ("copy", "bitcast", "convert", "reshape", "copy-done", "optimization-barrier")


def trip_count(
    loop: Instruction, caller: Computation, computations: dict[str, Computation]
) -> int | None:
    """Runs of the body of a `while` instruction; None if its text does not say.

    Args:
      loop: the instruction.
      caller: the computation it stands in.
      computations: all, by name.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    start = caller.get(loop.inputs[0])
    if start is None or start.opcode != "tuple":
        return None
    for place, name in enumerate(start.inputs):
        first = _Trace(computations).value(caller, name)
        if first is None:
            continue
        initial = {
            number: _Trace(computations).value(caller, given)
            for number, given in enumerate(start.inputs)
        }
        trace = _Trace(computations, counter=place, initial=initial)
        test = trace.comparison(computations[condition])
        if test is None:
            continue
        direction, bound = test
        results = computations[body].root
        if results.opcode != "tuple":
            return None
        after = trace.value(computations[body], results.inputs[place])
        if after is None or not after[0] or not after[1]:
            return None
        return _runs(first[1], bound, after[1], direction)
    return None


def _runs(first: int, bound: int, step: int, direction: str) -> int | None:
    if direction in ("LE", "GE"):
        bound += 1 if direction == "LE" else -1
    distance = bound - first
    if direction == "NE" and distance % step:
        return None
    if (step > 0) != (direction in ("LT", "LE")) and direction != "NE":
        return None
    return max(0, -(-distance // step))


class _Trace:
    """Follows an integer through copies, sums and fusions to a constant or the loop's counter.

    A value is a pair: whether the counter is in it, and what is added to that; or None, unknown.
    """

    def __init__(self, computations, counter: int | None = None, initial: dict | None = None):
        self.computations = computations
        self.counter = counter
        self.initial = initial or {}

    def value(self, computation: Computation, name: str, given: tuple = ()):
        found = computation.get(name)
        if found is None:
            return None
        if found.opcode == "constant":
            number = re.fullmatch(r"-?\d+", found.operands.strip())
            return (False, int(number[0])) if number else None
        if found.opcode == "parameter":
            place = int(found.operands)
            return given[place] if place < len(given) else None
        if found.opcode == "get-tuple-element":
            return self._element(computation, found, given)
        if found.opcode in _SAME:
            return self.value(computation, found.inputs[0], given)
        if found.opcode in ("add", "subtract"):
            left, right = (self.value(computation, operand, given) for operand in found.inputs)
            return _sum(left, right, -1 if found.opcode == "subtract" else 1)
        if found.opcode == "fusion":
            inner = self.computations[found.called("calls")[0]]
            arguments = tuple(self.value(computation, operand, given) for operand in found.inputs)
            return self.value(inner, inner.root.name, arguments)
        return None

    def comparison(self, condition: Computation, given: tuple = ()):
        """Direction and bound of the condition's test of the counter; None if it has another."""
        root = condition.root
        if root.opcode == "fusion":
            arguments = tuple(self.value(condition, operand, given) for operand in root.inputs)
            return self.comparison(self.computations[root.called("calls")[0]], arguments)
        if root.opcode != "compare":
            return None
        left, right = (self.value(condition, operand, given) for operand in root.inputs)
        if left is None or right is None or not left[0] or right[0]:
            return None
        return root.attribute("direction"), right[1] - left[1]

    def _element(self, computation, found, given):
        source = computation.get(found.inputs[0])
        place = int(found.attribute("index"))
        if source is not None and source.opcode == "tuple":
            return self.value(computation, source.inputs[place], given)
        if source is None or source.opcode != "parameter" or self.counter is None:
            return None
        return (True, 0) if place == self.counter else self.initial.get(place)


def _sum(left, right, sign):
    if left is None or right is None or (right[0] and (left[0] or sign < 0)):
        return None
    return left[0] or right[0], left[1] + sign * right[1]
