"""Layouts of the generation engine from descriptions that a person writes, with tags as text."""

import dataclasses
import json
import typing
from collections.abc import Callable

from parscale import layouts
from parscale.tokenizers import Tokenizer
from sharding.settings import InputError, nearest

FUNCTIONS = {"plain": layouts.plain, "shared_prompt": layouts.shared_prompt}
CLASSES = {
    "multiverse": layouts.Multiverse,
    "threadweaver": layouts.ThreadWeaver,
    "parathinker": layouts.ParaThinker,
    "ape": layouts.Ape,
    "hogwild": layouts.Hogwild,
}
NAMES = (*FUNCTIONS, *CLASSES)

PUBLISHED = {
    "multiverse": {
        "fork": "</Goal>",
        "outline": "<Outline>",
        "paths": [f"<Path> {number}" for number in range(1, 9)],
        "end": "</Path>",
        "conclusion": "<Conclusion>",
        "most": 256,
    },
    "threadweaver": {
        "fork": "</Outlines>",
        "outline": "<Outline>",
        "paths": [f"<Thread> {number}:" for number in range(1, 9)],
        "end": "</Thread>",
        "conclusion": "</Parallel>",
        "most": 256,
    },
    "parathinker": {
        "thoughts": [f"<think {number}>" for number in range(1, 5)],
        "ends": [f"</think {number}>" for number in range(1, 5)],
        "summary": "<summary>",
        "most": 256,
    },
    "hogwild": {"workers": ["\n\nAlice: ", "\n\nBob: "]},
    "ape": {},
}
"""What is taken where a description does not say: the tags of the published systems."""


def read(text: str, tokenizer: Tokenizer) -> Callable:
    """The layout of a description.

    Args:
      text: a name, or a JSON object with one, such as
        `{"name": "hogwild", "workers": ["A: ", "B: "], "arrangement": "contiguous"}`; its other
        fields are those of the layout's class, tags and texts as strings.
      tokenizer: of the tags.

    Raises:
      InputError: not such an object, an unknown name or field, one that is missing, or a value of
        another type.
    """
    description = {"name": text}
    if text.lstrip().startswith("{"):
        try:
            description = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"the layout {text!r} is no JSON: {error}") from None
    name = description.pop("name", None)
    if name not in NAMES:
        hint = nearest(name, NAMES) if isinstance(name, str) else ""
        raise InputError(f"layout {name!r}: expected one of {', '.join(NAMES)}{hint}")
    if name in FUNCTIONS:
        if description:
            raise InputError(f"layout {name} has no fields; {', '.join(description)} was given")
        return FUNCTIONS[name]
    kind = CLASSES[name]
    types = typing.get_type_hints(kind)
    for field in description:
        if field not in types:
            raise InputError(
                f"layout {name} has no field {field!r}, only {', '.join(types)}"
                f"{nearest(field, types)}"
            )
    values = PUBLISHED[name] | description
    for field in dataclasses.fields(kind):
        if field.name not in values and field.default is dataclasses.MISSING:
            raise InputError(f"layout {name}: its field {field.name} is missing")
    return kind(
        **{
            field: _value(f"layout {name}: {field}", types[field], value, tokenizer)
            for field, value in values.items()
        }
    )


def _value(what: str, kind: type, value: object, tokenizer: Tokenizer) -> object:
    """A field's value: text becomes tokens where the field is of tokens."""
    if kind == layouts.Tokens:
        if not isinstance(value, str):
            raise InputError(f"{what}={value!r}: expected text")
        return tuple(tokenizer.encode(value))
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise InputError(f"{what}={value!r}: expected a list of texts")
        return tuple(_value(what, layouts.Tokens, item, tokenizer) for item in value)
    allowed = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise InputError(f"{what}={value!r}: expected {kind.__name__}")
    return kind(value)
