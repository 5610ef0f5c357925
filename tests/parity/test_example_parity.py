"""The objective that docs/extending.md writes, and terms without an anchor, agree with the oracle as PRe does."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemo_pre.objectives.schedules import ScheduleConfig
from tests.parity.test_parity import GRADIENT, LOSS_LM, case, disagreements, run
from tests.ranks import RankError
from tests.reference import neva_pre

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
WEIGHT = 0.3  # no other term's
LAYOUTS = ["one-rank", "TP2", "TP2-SP", "PP2-VPP2", "CP2"]


def page(layers: list[int]) -> Any:
    """The page's objective as a callback."""
    from nemo_pre.callbacks.term_callback import TermCallback

    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    modules = []
    for name, block in zip(("nemo_pre.objectives.close", "nemo_pre.objectives.close.term"), blocks, strict=False):
        module: Any = ModuleType(name)
        sys.modules[name] = module  # a dataclass looks its module up
        exec(block, module.__dict__)
        modules.append(module)
    description, term = modules
    options = description.CloseConfig(enabled=True, weight=WEIGHT, layers=layers)
    assert description.Close.term == f"{term.__name__}:{term.CloseTerm.__name__}"
    return TermCallback(term.CloseTerm(options))


def example() -> Any:
    return page([2, 4])


def beyond() -> Any:
    return page([2, 99])


@dataclass
class ShortConfig:
    weight: float = WEIGHT
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layers: list[int] | None = field(default_factory=lambda: [2, 4])


def without_anchor() -> Any:
    """A term that asks visual tokens to be short, and looks at nothing but its layers."""
    from nemo_pre.callbacks.term_callback import TermCallback
    from nemo_pre.terms.layer_term import LayerTerm

    class Short(LayerTerm):
        name = "close"

        def anchor_width(self) -> int | None:
            return None

        def loss_sum(self, layer: int, micro_batch: Any, visual_tokens: Any, anchor: Any) -> Any:
            assert anchor is None
            return visual_tokens.square().mean(-1).sum()

    return TermCallback(Short(ShortConfig()))


def check_against_the_oracle(layout: str, objective: Any) -> None:
    """The oracle has PRe's place for the term."""
    job, config = case(layout, layers=(), objective=objective)
    config = replace(config, pre_layers=(2, 4), pre_weight=WEIGHT)
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        expected = neva_pre.reference_step(job.state, config, [batch for rank in data for batch in rank])
        assert records[0].metrics["reduced_train_loss"] == pytest.approx(expected["loss_lm"].item(), rel=LOSS_LM)
        for record in records:
            assert record.metrics.get("close/loss", 0.0) == pytest.approx(expected["loss_pre"].item(), rel=1e-6)
            assert record.metrics["close/weight"] == pytest.approx(WEIGHT)
        wrong = disagreements(records, expected, GRADIENT)
        assert not wrong, f"step {step}: {wrong}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_objective_of_the_page(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No head, and minus the distance for the cosine."""
    monkeypatch.setattr(neva_pre, "prediction_head", lambda tokens, *_: tokens)
    monkeypatch.setattr(neva_pre, "cosine", lambda tokens, anchor: -(tokens - anchor).square().mean())
    check_against_the_oracle(layout, example)


@pytest.mark.parametrize("layout", ["TP2-SP", "PP2", "PP2-VPP2"])
def test_a_term_without_an_anchor(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neva_pre, "prediction_head", lambda tokens, *_: tokens)
    monkeypatch.setattr(neva_pre, "cosine", lambda tokens, anchor: -tokens.square().mean())
    check_against_the_oracle(layout, without_anchor)


def test_a_layer_that_the_model_does_not_have_is_refused() -> None:
    job, _ = case("PP2", layers=(), objective=beyond)
    with pytest.raises(RankError, match=r"objective.close.layers=\[2, 99\] must name different layers between 1 and"):
        run(job)
