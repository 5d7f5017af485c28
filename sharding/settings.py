"""What every floor's configuration is made of: a documented field, and the error for bad input."""

import dataclasses
import difflib
from typing import Any, Literal

Resume = Literal["fixed", "growable", "free"]


class InputError(ValueError):
    """A person's mistake; the message says what was wrong, what was expected, how to mend it."""


def option(default: Any, doc: str, *, resume: Resume = "fixed", choices: tuple = ()) -> Any:
    """A dataclass field that carries its own help text.

    Args:
      default: the value when nothing is said.
      doc: one line for `--help`.
      resume: whether a run may go on with another value: "fixed" (no), "growable" (only upward,
        and by an explicit flag), "free" (yes).
      choices: the only values allowed, if not empty.
    """
    metadata = {"doc": doc, "resume": resume, "choices": choices}
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(config: Any) -> None:
    """Raises InputError for the first field of `config` whose value is not among its choices."""
    for field in dataclasses.fields(config):
        choices = field.metadata.get("choices", ())
        value = getattr(config, field.name)
        if choices and value not in choices:
            raise InputError(
                f"{field.name}={value!r}: expected one of {', '.join(map(str, choices))}"
                + nearest(str(value), choices)
            )


def check_at_least(config: Any, least: float, *names: str) -> None:
    """Raises InputError for the first named field of `config` below `least`."""
    for name in names:
        value = getattr(config, name)
        if value < least:
            raise InputError(f"{name}={value}: expected at least {least}")


def nearest(word: str, known: Any) -> str:
    """` (did you mean "..."?)` with the nearest known word, or nothing."""
    found = difflib.get_close_matches(word, list(map(str, known)), n=1)
    return f' (did you mean "{found[0]}"?)' if found else ""
