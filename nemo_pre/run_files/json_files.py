"""JSON and JSON lines that a user or another program wrote, read with one discipline: what is wrong is refused in one
sentence that names file, line and field. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_pre.options import nearest

KINDS = {str: "a text", int: "a whole number", float: "a number", list: "a list", dict: "an object"}
SHOWN = 60  # characters of a wrong value


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        what: the file is meant to be, as the end of a sentence has it.

    Raises:
        ValueError: it cannot be read, or holds no object.
    """
    return _object(read_text(path, what), str(path))


def read_json_lines(path: str | Path, what: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each object of a file of JSON lines stands, for sentences, and the object. Lines end at line feeds and
    nowhere else; blank ones are passed over.

    Raises:
        ValueError: the file cannot be read, or a line holds no object.
    """
    for number, line in enumerate(read_text(path, what).split("\n"), start=1):
        where = f"{path}, line {number}"
        if line.strip():
            yield where, _object(line, where)


def read_text(path: str | Path, what: str) -> str:
    """The text of a UTF-8 file, without the mark that some editors put before it.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): name {what}.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start}): name {what}.") from error


def check_fields(
    found: Mapping[str, Any], where: str, known: Mapping[str, type], needed: tuple[str, ...] = ()
) -> None:
    """Refuse an object with a field that is unknown, missing or of another type.

    Args:
        where: the object stands.
        known: the type of each field.
        needed: the fields that must be there.

    Raises:
        ValueError: one sentence about the first such field.
    """
    for name in found:
        if name not in known:
            near = nearest(name, known)
            hint = f"the nearest is '{near}'" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{where}: there is no field '{name}', {hint}.")
    for name in needed:
        if name not in found:
            raise ValueError(f"{where}: the field '{name}' is missing.")
    for name, value in found.items():
        check_type(value, known[name], f"{where}: '{name}'")


def check_type(value: Any, kind: type, what: str) -> None:
    """Refuse a value that JSON gave and that is of another type; a whole number is a number too.

    Raises:
        ValueError: one sentence that begins with ``what``.
    """
    kinds = (int, float) if kind is float else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
        shown = json.dumps(value, ensure_ascii=False)
        shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
        raise ValueError(f"{what} is {shown}, where {KINDS[kind]} is expected.")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "it is nested too deep"
        raise ValueError(f"{where} is no JSON ({reason}): mend it.") from error
    check_type(value, dict, where)
    return dict(value)
