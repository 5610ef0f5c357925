"""Exact match of generated answers, per type of question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total


def normalise(answer: str) -> str:
    """Letter case, the space between words and a full stop at the end do not count."""
    return " ".join(answer.lower().split()).removesuffix(".").rstrip()


def exact_match(predictions: Sequence[str], answers: Sequence[str], question_types: Sequence[str]) -> dict[str, Score]:
    """Scores by question type in alphabetical order, and ``all`` of them first; empty without answers."""
    assert len(predictions) == len(answers) == len(question_types)
    tally: dict[str, list[bool]] = {}
    for prediction, answer, kind in zip(predictions, answers, question_types, strict=True):
        for name in {"all", kind}:
            tally.setdefault(name, []).append(normalise(prediction) == normalise(answer))
    names = sorted(tally, key=lambda name: (name != "all", name))
    return {name: Score(sum(tally[name]), len(tally[name])) for name in names}
