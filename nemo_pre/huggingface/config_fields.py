"""What a field of a ``config.json`` may hold: read, of one value only, or of no consequence; anything else is refused.

Published files differ by what their writers knew, and a field that is passed over in silence is a model that computes
something else. So every field has a declaration (:mod:`nemo_pre.huggingface.config_tables`), and one that has none is
refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.huggingface.own_files import own_file


@dataclass(frozen=True)
class Kind:
    """What a field may hold: in words, after "it must be", and as a test."""

    words: str
    accepts: Callable[[Any], bool]

    @property
    def or_null(self) -> Kind:
        return Kind(f"{self.words}, or null", lambda value: value is None or self.accepts(value))


@dataclass(frozen=True)
class Read:
    """A field that the model is built from.

    Attributes:
        kind: what it may hold.
        default: where a file leaves it out: what ``transformers`` takes then, whose writers leave out such values.
            REQUIRED: it must be there.
    """

    kind: Kind
    default: Any


@dataclass(frozen=True)
class Only:
    """A field that must hold what our layers do: this value, or one that means the same. Left out, it means it too."""

    value: Any
    also: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Irrelevant:
    """A field that does not change what the model computes, and why."""

    why: str


REQUIRED = object()
Field = Read | Only | Irrelevant
Table = Mapping[str, Field]


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _list_of(accepts: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(accepts, value))


def _count(value: Any) -> bool:
    return _whole(value) and 1 <= value < 2**31


def _index(value: Any) -> bool:
    return _whole(value) and 0 <= value < 2**31


COUNT = Kind("a whole number of 1 or more", _count)
INDEX = Kind("a whole number of 0 or more", _index)
LAYER = Kind("a whole number, since only one layer is imported", lambda value: _whole(value) and abs(value) < 2**31)
POSITIVE = Kind("a number above 0", lambda value: _finite(value) and 0 < value < 1e30)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WORD = Kind("a text", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
INDICES = Kind("a list of whole numbers of 0 or more", _list_of(_index))
FULL_ATTENTION = Kind(
    "a list of nothing but full_attention",
    _list_of(lambda value: isinstance(value, str) and value == "full_attention"),
)


def one_of(*words: str) -> Kind:
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def read_fields(values: Mapping[str, Any], table: Table, where: str) -> dict[str, Any]:
    """The values of the fields that are read, each of the kind it must be.

    Args:
        where: the file, and the part of it, as it is named in sentences.

    Raises:
        ValueError: one sentence: on a field of another kind or value, on one that is missing, or on one that the table
            does not know and that holds something.
    """
    unknown = [name for name, value in values.items() if name not in table and value is not None]
    if unknown:
        raise ValueError(
            f"{where} has {listed(unknown)}, of which it is not known whether the model computes something else with "
            f"it: remove what does not matter."
        )
    found: dict[str, Any] = {}
    for name, field in table.items():
        if isinstance(field, Read):
            found[name] = _value(values, name, field, where)
        elif isinstance(field, Only) and name in values and not _any_same(values[name], (field.value, *field.also)):
            raise ValueError(f"{where} has {name}={short(values[name])}: only {name}={field.value} is imported.")
    return found


def _value(values: Mapping[str, Any], name: str, field: Read, where: str) -> Any:
    if name not in values:
        if field.default is REQUIRED:
            raise ValueError(f"{where} has no {name}, which must be {field.kind.words}.")
        return field.default
    if not field.kind.accepts(values[name]):
        raise ValueError(f"{where} has {name}={short(values[name])}: it must be {field.kind.words}.")
    return values[name]


def _any_same(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Equal, and true is not 1."""
    return any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in accepted)


def short(value: Any) -> str:
    """A value within a sentence."""
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: list[str]) -> str:
    """The first names and how many there are."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: there is none, or it cannot be read, it is no object, or it lies elsewhere.
    """
    own_file(path.parent, path.name)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist: name a downloaded Hugging Face model.") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {short(error)}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} does not hold a JSON object.")
    return values
