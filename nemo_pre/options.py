"""What an option may hold, and what a resume can make of it, said where the option is declared.

A dataclass field made by :func:`choice`, :func:`number` or :func:`place` carries its rule with it, and so does a
parameter of a verb whose annotation is one of the types below (:data:`Count`, :data:`PathText`, ...). The check of a
run, the command line, its help and the code that reads the option all ask the rule, so that no list of allowed values
stands twice.

What becomes of a changed option when a run continues is an :class:`OnResume`; which option has which is said by
:mod:`nemo_pre.config.on_resume`, and for an objective's options by the objective.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

RULE = "nemo_pre"  # the key of a field's metadata
LARGEST_SEED = 2**31 - 1  # numpy's generators take 32 bits, and ranks add their number to it


@dataclass(frozen=True)
class Rule:
    """What a value must be; None as a value is always allowed, where the option's type allows it.

    Attributes:
        choices: the allowed words, each with what it means, or an empty text.
        least: the smallest number allowed.
        above: what a number must be larger than.
        most: the largest number allowed.
        path: whether the value is the path of a file or folder, in which a leading ``~`` is the user's home.
        may_be_empty: whether an empty text is a value.
    """

    choices: Mapping[str, str] | None = field(default=None, hash=False)
    least: float | None = None
    above: float | None = None
    most: float | None = None
    path: bool = False
    may_be_empty: bool = False

    def problem(self, name: str, value: Any) -> str | None:
        """The sentence that refuses ``name=value``; None where it is allowed. Of a list every item must be."""
        if value is None or (isinstance(value, str) and value == "???"):
            return None
        if isinstance(value, list | tuple):
            return next((found for item in value if (found := self.problem(name, item)) is not None), None)
        if self.choices is not None:
            allowed = value in self.choices
            return None if allowed else f"{name}={value} is unknown: choose one of {', '.join(self.choices)}."
        if isinstance(value, str):
            return None if value.strip() or self.may_be_empty else f"{name} is empty: give it a value."
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name}={value} is no finite number{f': it must {self.range}' if self.has_range else ''}."
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )
        return None if inside else f"{name}={value} must {self.range}."

    @property
    def has_range(self) -> bool:
        """Whether the rule bounds numbers."""
        return any(bound is not None for bound in (self.least, self.above, self.most))

    @property
    def range(self) -> str:
        """The allowed numbers in words, as they follow "must"."""
        if self.above is not None:
            most = "" if self.most is None else f" and at most {_plain(self.most)}"
            return f"be more than {_plain(self.above)}{most}"
        if self.most is not None:
            return f"lie between {_plain(self.least or 0)} and {_plain(self.most)}"
        return f"be {_plain(self.least or 0)} or more"

    @property
    def help(self) -> str:
        """The rule as one line of a help text, empty where there is nothing to say."""
        if self.choices is not None:
            return " | ".join(word + (f" ({meaning})" if meaning else "") for word, meaning in self.choices.items())
        return f"must {self.range}" if self.has_range else ""


def _plain(number: float) -> str:
    """A bound without an exponent where it is whole."""
    return str(int(number)) if number == int(number) and abs(number) >= 1e6 else f"{number:g}"


# --- fields of a configuration ---------------------------------------------------------------------------------------


def choice(default: Any, choices: Mapping[str, str] | Sequence[str]) -> Any:
    """A dataclass field that holds one of the words ``choices``, which may say what each means."""
    words = dict(choices) if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    return field(default=default, metadata={RULE: Rule(choices=words)})


def number(default: Any, least: float | None = None, above: float | None = None, most: float | None = None) -> Any:
    """A dataclass field that holds a number within bounds, or a list of them, or None where its type allows it."""
    return field(default=default, metadata={RULE: Rule(least=least, above=above, most=most)})


def numbers(default: Sequence[float], least: float | None = None, above: float | None = None) -> Any:
    """A dataclass field that holds a list of numbers, ``default`` unless given."""
    return field(default_factory=lambda: list(default), metadata={RULE: Rule(least=least, above=above)})


def fraction(default: Any) -> Any:
    """A dataclass field that holds a number between 0 and 1."""
    return number(default, least=0, most=1)


def seed_number(default: Any) -> Any:
    """A dataclass field that holds what random numbers begin with."""
    return number(default, least=0, most=LARGEST_SEED)


def place(default: Any) -> Any:
    """A dataclass field that holds the path of a file or folder; a leading ``~`` is the user's home."""
    return field(default=default, metadata={RULE: Rule(path=True)})


# --- parameters of a verb --------------------------------------------------------------------------------------------

PathText = Annotated[str, Rule(path=True)]
Count = Annotated[int, Rule(least=1)]
CountOrNone = Annotated[int, Rule(least=0)]  # 0: none of them
Seed = Annotated[int, Rule(least=0, most=LARGEST_SEED)]
Positive = Annotated[float, Rule(above=0)]
FreeText = Annotated[str, Rule(may_be_empty=True)]


# --- asking ----------------------------------------------------------------------------------------------------------


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The one of ``choices`` that ``word`` was most likely meant to be: one that ends in it behind a dot, or one
    written almost alike; None where there is none."""
    known = list(choices)
    endings = [name for name in known if name.rpartition(".")[2] == word.rpartition(".")[2]]
    if len(endings) == 1:
        return endings[0]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
    return close[0] if close else None


def split_paths(text: str) -> list[str]:
    """The paths in a list that commas separate. One may have commas itself: the longest piece that exists counts."""
    pieces, found = text.split(","), []
    while pieces:
        lengths = range(len(pieces), 1, -1)
        length = next((size for size in lengths if os.path.exists(",".join(pieces[:size]).strip())), 1)
        found.append(os.path.expanduser(",".join(pieces[:length]).strip()))
        pieces = pieces[length:]
    return found


def choices_of(owner: type, name: str) -> tuple[str, ...]:
    """The words that the field ``name`` of the dataclass ``owner`` may hold."""
    rule = next(f for f in dataclasses.fields(owner) if f.name == name).metadata[RULE]
    return tuple(rule.choices)


def rule_of(owner: type, name: str) -> Rule:
    """The rule of the field ``name`` of the dataclass ``owner``, for an option of a verb that means the same."""
    rule = next(f for f in dataclasses.fields(owner) if f.name == name).metadata[RULE]
    assert isinstance(rule, Rule)
    return rule


def alternatives(owner: type, name: str) -> str:
    """The words that the field ``name`` of the dataclass ``owner`` may hold, as a sentence has them: a, b or c."""
    *others, last = choices_of(owner, name)
    return f"{', '.join(others)} or {last}"


def value_problems(values: Any, prefix: str = "") -> Iterator[str]:
    """Every value in a dataclass, and in those inside it, that its field's rule refuses, as one sentence each. A field
    without a rule may hold no empty text and no number that is not finite."""
    for part in dataclasses.fields(values):
        name, value = prefix + part.name, getattr(values, part.name)
        if dataclasses.is_dataclass(value):
            yield from value_problems(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from value_problems(item, f"{name}[{index}].")
        else:
            problem = part.metadata.get(RULE, Rule()).problem(name, value)
            if problem is not None:
                yield problem


def with_homes(values: Any) -> None:
    """Write the user's home in the place of a leading ``~`` into every path of a dataclass and of those inside it."""
    for part in dataclasses.fields(values):
        value = getattr(values, part.name)
        for inner in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(inner):
                with_homes(inner)
        if isinstance(value, str) and part.metadata.get(RULE, Rule()).path:
            setattr(values, part.name, os.path.expanduser(value))


def changed_fields(values: Any) -> list[str]:
    """The names of a dataclass's fields that are not at their defaults."""
    default = type(values)()
    return [f.name for f in dataclasses.fields(values) if getattr(values, f.name) != getattr(default, f.name)]


# --- when a run continues -------------------------------------------------------------------------------------------

APPLIED, KEPT, REFUSED = "applied", "kept", "refused"
Change = Callable[[Any, Any, Any], bool]


@dataclass(frozen=True)
class OnResume:
    """What becomes of an option that has another value than when the checkpoint was written that a run continues from.

    Attributes:
        does: ``applied``, the run goes on with the new value; ``kept``, with the old one; or ``refused``.
        words: from when on and for what, or why not; what a continued run prints and the manual's table has.
        refuses: of an applied option the changes that are refused all the same, called with the value before, the one
            now, and the run's configuration.
        where: which those are, in words that follow on "refused".
        why: why they are.
        weights_go_on: of a refused change whether a new run can start from the checkpoint's weights with it.
    """

    does: str
    words: str
    refuses: Change | None = None
    where: str = ""
    why: str = ""
    weights_go_on: bool = True

    def of(self, before: Any, now: Any, config: Any) -> OnResume:
        """What becomes of this very change: one without exceptions."""
        if self.refuses is None:
            return self
        if self.refuses(before, now, config):
            return OnResume(REFUSED, f"{self.why} ({self.where})", weights_go_on=self.weights_go_on)
        return OnResume(self.does, self.words)


def applied(words: str, refuses: Change | None = None, where: str = "", why: str = "") -> OnResume:
    """The run goes on with the new value, but for the changes that ``refuses`` finds."""
    return OnResume(APPLIED, words, refuses, where, why)


def kept(words: str) -> OnResume:
    """The run goes on with the old value."""
    return OnResume(KEPT, words)


def refused(words: str, weights_go_on: bool = True) -> OnResume:
    """The run does not go on with a new value; a new run may, from its weights."""
    return OnResume(REFUSED, words, weights_go_on=weights_go_on)


def comes_or_goes(before: Any, now: Any, config: Any) -> bool:
    """Whether a part of the model that an option switches on by being set is added or removed."""
    return (before is None) != (now is None)
