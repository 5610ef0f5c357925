"""The objective that docs/extending.md writes, run from there, agrees with the oracle as PRe does."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.parity.test_parity import GRADIENT, LOSS_LM, case, disagreements, run
from tests.ranks import RankError
from tests.reference import neva_pre

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
WEIGHT = 0.3  # no other term's


def example() -> Any:
    """The page's callback, on two layers."""
    (block,) = re.findall(r"^   ```python\n(.*?)^   ```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    module: Any = ModuleType("example")
    sys.modules["example"] = module  # a dataclass looks its module up
    exec(re.sub(r"^   ", "", block, flags=re.MULTILINE), module.__dict__)
    return module.CloseCallback(module.CloseConfig(enabled=True, weight=WEIGHT, layers=[2, 4]))


@pytest.mark.parametrize("layout", ["one-rank", "TP2", "TP2-SP", "PP2-VPP2", "CP2"])
def test_the_objective_of_the_page(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle has PRe's place for it: no head, and minus the distance for the cosine."""
    monkeypatch.setattr(neva_pre, "prediction_head", lambda tokens, *_: tokens)
    monkeypatch.setattr(neva_pre, "cosine", lambda tokens, anchor: -(tokens - anchor).square().mean())
    job, config = case(layout, layers=(), objective=example)
    config = replace(config, pre_layers=(2, 4), pre_weight=WEIGHT)
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        expected = neva_pre.reference_step(job.state, config, [batch for rank in data for batch in rank])
        assert records[0].metrics["reduced_train_loss"] == pytest.approx(expected["loss_lm"].item(), rel=LOSS_LM)
        for record in records:
            assert record.metrics["close/loss"] == pytest.approx(expected["loss_pre"].item(), rel=1e-6)
            assert record.metrics["close/weight"] == pytest.approx(WEIGHT)
        wrong = disagreements(records, expected, GRADIENT)
        assert not wrong, f"step {step}: {wrong}"


def beyond() -> Any:
    objective = example()
    objective.config.layers = [2, 99]
    return objective


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    job, _ = case("PP2", layers=(), objective=beyond)
    with pytest.raises(RankError, match=r"close looks at layers \[2, 99\]: the model has 1 of them"):
        run(job)
