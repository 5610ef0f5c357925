"""What a field of the configuration may hold, said where the field is declared, and what a resume can make of it.

A dataclass field made by :func:`choice` or :func:`number` carries its rule with it. The check of a run, the help of
the command line and the code that reads the field all ask the field, so that no list of allowed values stands twice.

What becomes of a changed option when a run continues is an :class:`OnResume`; which option has which is said by
:mod:`nemo_pre.config.on_resume`, and for an objective's options by the objective.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RULE = "nemo_pre"  # the key of a field's metadata


@dataclass(frozen=True)
class Rule:
    """What a value must be; None as a value is always allowed, where the field's type allows it.

    Attributes:
        choices: the allowed words, each with what it means, or an empty text.
        least: the smallest number allowed.
        above: what a number must be larger than.
        most: the largest number allowed.
    """

    choices: Mapping[str, str] | None = None
    least: float | None = None
    above: float | None = None
    most: float | None = None

    def problem(self, name: str, value: Any) -> str | None:
        """The sentence that refuses ``name=value``; None where it is allowed."""
        if value is None or (isinstance(value, str) and value == "???"):
            return None
        if self.choices is not None:
            allowed = value in self.choices
            return None if allowed else f"{name}={value} is unknown: choose one of {', '.join(self.choices)}."
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )
        return None if inside else f"{name}={value} must {self.range}."

    @property
    def range(self) -> str:
        """The allowed numbers in words, as they follow "must"."""
        if self.above is not None:
            return f"be more than {self.above:g}"
        if self.most is not None:
            return f"lie between {self.least or 0:g} and {self.most:g}"
        return f"be {self.least or 0:g} or more"

    @property
    def help(self) -> str:
        """The rule as one line of a help text."""
        if self.choices is None:
            return f"must {self.range}"
        return " | ".join(word + (f" ({meaning})" if meaning else "") for word, meaning in self.choices.items())


def choice(default: Any, choices: Mapping[str, str] | Sequence[str]) -> Any:
    """A dataclass field that holds one of the words ``choices``, which may say what each means."""
    words = dict(choices) if isinstance(choices, Mapping) else dict.fromkeys(choices, "")
    return field(default=default, metadata={RULE: Rule(choices=words)})


def number(default: Any, least: float | None = None, above: float | None = None, most: float | None = None) -> Any:
    """A dataclass field that holds a number within bounds, or None where its type allows it."""
    return field(default=default, metadata={RULE: Rule(least=least, above=above, most=most)})


def fraction(default: Any) -> Any:
    """A dataclass field that holds a number between 0 and 1."""
    return number(default, least=0, most=1)


def choices_of(owner: type, name: str) -> tuple[str, ...]:
    """The words that the field ``name`` of the dataclass ``owner`` may hold."""
    rule = next(f for f in dataclasses.fields(owner) if f.name == name).metadata[RULE]
    return tuple(rule.choices)


def alternatives(owner: type, name: str) -> str:
    """The words that the field ``name`` of the dataclass ``owner`` may hold, as a sentence has them: a, b or c."""
    *others, last = choices_of(owner, name)
    return f"{', '.join(others)} or {last}"


def value_problems(values: Any, prefix: str = "") -> Iterator[str]:
    """Every value in a dataclass, and in those inside it, that its field's rule refuses, as one sentence each."""
    for part in dataclasses.fields(values):
        name, value = prefix + part.name, getattr(values, part.name)
        if dataclasses.is_dataclass(value):
            yield from value_problems(value, f"{name}.")
        elif isinstance(value, list) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from value_problems(item, f"{name}[{index}].")
        elif RULE in part.metadata:
            problem = part.metadata[RULE].problem(name, value)
            if problem is not None:
                yield problem


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
