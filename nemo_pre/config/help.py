"""Every option of a run in words: ``nemo-pre train --help PART``.

Nothing is written here a second time. What an option is for is the comment at its field, read from the source; what
it may hold is the field's rule (:mod:`nemo_pre.options`); name, type and default are the field's own.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Any

from omegaconf import MISSING

from nemo_pre.config.run import RunConfig
from nemo_pre.options import RULE, Rule

RUN = "run"  # the part with the options that belong to no other
WIDTH = 119


@dataclass(frozen=True)
class Option:
    """An option of a run.

    Attributes:
        name: as it stands on the command line, such as ``trainer.max_steps``.
        kind: its type in words.
        default: as it is written on the command line; None: it has none.
        rule: what it may hold; None: whatever its type allows.
        comment: what it is for, may be empty.
    """

    name: str
    kind: str
    default: str | None
    rule: Rule | None
    comment: str


def describe_part(part: str) -> str:
    """The options of one part of a run's configuration, such as ``trainer`` or ``objective.laver``, or a single one.

    Raises:
        ValueError: the configuration has no such part.
    """
    found = [option for option in run_options() if _belongs(option.name, part)]
    if not found:
        raise ValueError(f"'{part}' is no part of a run's options: choose one of {', '.join(parts())}.")
    purpose = _purpose(parts()[part]) if part in parts() else ""
    return f"{purpose}options and defaults:\n" + "\n".join(map(_lines, found))


@cache
def parts() -> Mapping[str, type]:
    """The dataclasses that a run's configuration is made of, by the name under which help is asked for."""
    return {RUN: RunConfig, **dict(_parts(RunConfig, ""))}


def run_options() -> Iterator[Option]:
    """Every option that ``nemo-pre train`` takes, in the order of the dataclasses."""
    return _options(RunConfig, "")


def _purpose(owner: type) -> str:
    """The docstring of a part; without one dataclasses put the signature in its place, which tells nothing new."""
    text = inspect.getdoc(owner) or ""
    return "" if text.startswith(f"{owner.__name__}(") else f"{text}\n\n"


def _belongs(name: str, part: str) -> bool:
    return "." not in name if part == RUN else name == part or name.startswith((f"{part}.", f"{part}["))


def _parts(owner: type, prefix: str) -> Iterator[tuple[str, type]]:
    for name, inner, _ in _inner(owner):
        if inner is not None:
            yield prefix + name, inner
            yield from _parts(inner, f"{prefix}{name}.")


def _options(owner: type, prefix: str) -> Iterator[Option]:
    comments = field_comments(owner)
    fields = {field.name: field for field in dataclasses.fields(owner)}
    for name, inner, listed in _inner(owner):
        if inner is None or listed:
            field = fields[name]
            rule = field.metadata.get(RULE)
            yield Option(prefix + name, _kind(field.type), _default(field), rule, comments.get(name, ""))
        if inner is not None:
            yield from _options(inner, f"{prefix}{name}[0]." if listed else f"{prefix}{name}.")


def _inner(owner: type) -> Iterator[tuple[str, type | None, bool]]:
    """Name of each field, the dataclass that it holds, if one, and whether it holds a list of them."""
    hints = typing.get_type_hints(owner)
    for field in dataclasses.fields(owner):
        hint = hints[field.name]
        for kind in typing.get_args(hint) if isinstance(hint, UnionType) else (hint,):
            listed = typing.get_origin(kind) is list
            inside = typing.get_args(kind)[0] if listed else kind
            if isinstance(inside, type) and dataclasses.is_dataclass(inside):
                yield field.name, inside, listed
                break
        else:
            yield field.name, None, False


def _kind(kind: Any) -> str:
    words = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return words.replace("None", "null").replace(" | ", " or ")


def _default(field: dataclasses.Field[Any]) -> str | None:
    value = field.default_factory() if callable(field.default_factory) else field.default
    if value == MISSING:
        return None
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _lines(option: Option) -> str:
    default = "" if option.default is None else option.default
    needed = ", needed" if option.default is None else ""
    texts = [text for text in (option.comment, option.rule.help if option.rule is not None else "") if text]
    filled = (textwrap.fill(text, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 8) for text in texts)
    return "\n".join([f"  {option.name}={default}   {option.kind}{needed}", *filled])


# --- the comments at the fields -------------------------------------------------------------------------------------


def field_comments(owner: type) -> dict[str, str]:
    """What the comments at a dataclass's fields say: those behind or within a field, else the lines above it."""
    found: dict[str, str] = {}
    for kind in reversed(owner.__mro__):
        if dataclasses.is_dataclass(kind):
            found |= _written_comments(kind)
    return found


def _written_comments(owner: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):
        return {}  # it was made by a function, field by field
    comments: dict[int, tuple[str, bool]] = {}  # by line: the text, and whether it stands alone
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# "), not token.line[: token.start[1]].strip()
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own = [comments[line][0] for line in range(node.lineno, (node.end_lineno or 0) + 1) if line in comments]
            found[node.target.id] = " ".join(own or reversed(list(_above(comments, node.lineno))))
    return found


def _above(comments: Mapping[int, tuple[str, bool]], line: int) -> Iterator[str]:
    """The comments that stand alone on the lines above ``line``, nearest first."""
    while comments.get(line - 1, ("", False))[1]:
        line -= 1
        yield comments[line][0]
