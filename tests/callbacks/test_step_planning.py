"""What the planner of a step refuses before it looks at the data; its counts are compared in tests/parity."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from nemo_pre.callbacks.step_planning import StepPlanning
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.parallel.sequence_layout import IMAGE_TOKEN_INDEX, sequence_layout, square_tiles
from nemo_pre.terms.step_planner import StepPlanner
from nemo_pre.terms.term import Term, Weight


class Counted(Term):
    """A term of one name that counts two things of one name each."""

    def __init__(self, name: str, value: float, count: str = "corners") -> None:
        self.name, self.value, self.count = name, value, count

    def weights(self):
        return {self.name: Weight(self.value, ScheduleConfig(kind="linear", steps=4))}

    def counts(self, layout, branch):
        return {self.count: 4 * layout.num_images, "none": 0}


def test_lightnings_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="set limit_val_batches=0"):
        StepPlanning().on_megatron_microbatches_start(SimpleNamespace(forward_only=True))


def test_a_loss_term_has_one_objective() -> None:
    planner, one = StepPlanner(), Counted("close", 0.25)
    planner.add(one)
    planner.add(one)  # a second fit of the same objective
    assert [planner.weights["close"].at(step) for step in (0, 2, 9)] == [0.0, 0.125, 0.25]
    with pytest.raises(ValueError, match="Two objectives have a loss term 'close'"):
        planner.add(Counted("close", 1.0))


def batch() -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[1, IMAGE_TOKEN_INDEX, 2, 3]])
    return {"tokens": tokens, "labels": tokens.clamp(min=0), "loss_mask": torch.tensor([[0.0, 0.0, 1.0, 1.0]])}


def test_what_terms_count_is_summed_over_micro_batches() -> None:
    planner = StepPlanner()
    planner.add(Counted("close", 0.25))
    layout = sequence_layout(batch()["tokens"], square_tiles([1], 4), IMAGE_TOKEN_INDEX, 16)
    counts = planner._counts([batch()] * 3, [layout] * 3, [None] * 3)
    assert counts == {"loss_tokens": 6, "visual_tokens": 12, "images": 3, "corners": 12, "none": 0}


def test_a_count_has_one_term() -> None:
    planner = StepPlanner()
    planner.add(Counted("close", 0.25))
    planner.add(Counted("far", 0.25))
    layout = sequence_layout(batch()["tokens"], square_tiles([1], 4), IMAGE_TOKEN_INDEX, 16)
    with pytest.raises(ValueError, match="Two terms count 'corners'"):
        planner._counts([batch()], [layout], [None])
