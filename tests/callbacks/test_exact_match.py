"""Counting of exact matches over data-parallel ranks."""

from __future__ import annotations

import pytest

from nemo_pre.callbacks.exact_match import Result, add_up
from nemo_pre.data.scoring import Score, exact_match


def result(predictions: list[str], answers: list[str], kinds: list[str], loss: float, seconds: float) -> Result:
    return Result(exact_match(predictions, answers, kinds), loss, len(answers), 3 * len(answers), seconds)


def test_ranks_with_unequal_shares_and_types_add_up_to_one_count() -> None:
    first = result(["2", "yes", "4 7"], ["2", "no", "4 7"], ["count", "exists", "read"], loss=3.0, seconds=2.0)
    second = result(["3", "5"], ["3", "6"], ["count", "count"], loss=1.0, seconds=4.0)
    total = add_up([first, second])
    assert total.scores == {
        "all": Score(3, 5),
        "count": Score(2, 3),
        "exists": Score(0, 1),
        "read": Score(1, 1),
    }
    assert list(total.scores) == ["all", "count", "exists", "read"]
    metrics = total.metrics()
    assert metrics["val/exact_match"] == pytest.approx(0.6)
    assert metrics["val/exact_match/count"] == pytest.approx(2 / 3)
    assert metrics["val/answers/count"] == 3
    assert metrics["val/lm_loss"] == pytest.approx(4.0 / 5)
    assert "5 answers, 15 tokens in 4.0 s, 1.25 answers/s" in str(total)


def test_a_rank_without_samples_adds_nothing() -> None:
    some = result(["2"], ["2"], ["count"], loss=1.0, seconds=1.0)
    assert add_up([some, Result({}, 0.0, 0, 0, 0.1)]).scores == some.scores
