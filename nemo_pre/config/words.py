"""The words of a command line that set a run's options, as Hydra's grammar wants them.

Hydra reads a value by a grammar of its own, in which ``=``, blanks, brackets, commas, quotes and ``~`` mean something.
A path may hold all of them. So a value of an option that holds a text is taken as it stands behind the first ``=`` and
quoted for Hydra here, in the one place that every verb's words come through.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import recipes
from nemo_pre.config.help import run_options
from nemo_pre.options import nearest

SWITCHES, SWITCHED = ("bool", "bool or null"), ("true", "false", "yes", "no", "on", "off", "1", "0", "null", "???")
TEXTS, MAPPINGS = ("str", "str or null"), "dict["


def as_override(word: str) -> str:
    """``OPTION=VALUE`` in Hydra's grammar.

    A text keeps every character; ``null`` stays nothing, ``${...}`` the value of another option. Lists and mappings
    are read as Hydra's grammar has them or, where that cannot, as YAML has them.

    Raises:
        ValueError: the word is no such pair, or its value is no list that can be read.
    """
    name, equals, value = word.partition("=")
    texts, switches, mappings = _names_by_kind()
    option = name.lstrip("+")
    if equals and f"{name}.".startswith(mappings):  # Hydra wants to be told that an entry may be new
        name, word = f"++{name}", f"++{word}"
    if equals and (option in texts or option.startswith(mappings)):
        return word if value.lower() == "null" else f"{name}={_quoted(value)}"
    if equals and option in switches and value.lower() not in SWITCHED and "${" not in value:
        raise ValueError(f"{option} has a value that does not fit: {value!r} is neither true nor false.")
    if equals and option in recipes.groups() and not value.startswith("["):
        return f"{name}={_quoted(value)}"
    if name.strip("+~") and _is_readable(word):
        return word
    if equals and value.lstrip().startswith(("[", "{")):
        return f"{name}={_rendered(_yaml(word, value))}"
    raise ValueError(f"{word!r} cannot be read: write OPTION=VALUE, such as optim.lr=1e-4, and a list as [a,b].")


def unknown_option(name: str) -> str:
    """The sentence about an option that no run has."""
    near = nearest(name, [*option_names(), *recipes.groups()])
    if near is not None:
        return f"There is no option {name}: the nearest is {near}."
    return f"There is no option {name}: see nemo-pre train --cfg job for what can be set."


def check_spelling(word: str, own: Iterable[str]) -> None:
    """Refuse ``OPTION=VALUE`` whose option no run has, where it is nearly one of a verb's own words.

    Raises:
        ValueError: one sentence with the nearest.
    """
    name, own = word.partition("=")[0].lstrip("+~"), list(own)
    if name in option_names() or name in recipes.groups() or name in own:
        return
    near = nearest(name, [*own, *option_names(), *recipes.groups()])
    if near in own:
        raise ValueError(f"There is no option {name}: the nearest is {near}.")


@cache
def option_names() -> tuple[str, ...]:
    """The dotted names of all options of a run."""
    return tuple(option.name for option in run_options())


@cache
def _names_by_kind() -> tuple[frozenset[str], frozenset[str], tuple[str, ...]]:
    """The options that hold a text, those that are true or false, and what the names of those begin with that are
    entries of a mapping of texts."""
    options = list(run_options())
    texts, switches = (frozenset(each.name for each in options if each.kind in kinds) for kinds in (TEXTS, SWITCHES))
    return texts, switches, tuple(f"{option.name}." for option in options if option.kind.startswith(MAPPINGS))


def _is_readable(word: str) -> bool:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(word)
    except HydraException:
        return False
    return True


def _quoted(text: str) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _yaml(word: str, value: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ValueError(
            f"{word!r} cannot be read: write a list as [a,b], a mapping as {{a: b}}, texts with special characters "
            f"in quotes."
        ) from error


def _rendered(value: Any) -> str:
    """A value that YAML gave, in Hydra's grammar."""
    if isinstance(value, dict):
        return "{" + ",".join(_pairs(value)) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_rendered, value)) + "]"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value) if _is_number(value) else _quoted(str(value))


def _pairs(values: dict[Any, Any]) -> Iterator[str]:
    for key, value in values.items():
        yield f"{key}:{_rendered(value)}"  # a key is a name, which Hydra takes without quotes only


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
