"""What lmms-eval calls for the task ``digits``."""

from __future__ import annotations

from typing import Any

from nemo_pre.data.scoring import normalise


def images(row: dict[str, Any]) -> list[Any]:
    return [row["image"]] if row["image"] is not None else []


def exact_match(row: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """Whether the answer is exact, counted for all questions and for the row's type."""
    matched = float(normalise(answers[0]) == normalise(row["answer"]))
    return {"exact_match": matched, f"exact_match_{row['question_type']}": matched}
