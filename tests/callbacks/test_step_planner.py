"""What the planner of a step refuses before it looks at the data; its counts are compared in tests/parity."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nemo_pre.callbacks.step_planner import StepPlanner
from nemo_pre.config.schema import ScheduleConfig


def test_lightnings_validation_is_refused() -> None:
    with pytest.raises(ValueError, match="set limit_val_batches=0"):
        StepPlanner().on_megatron_microbatches_start(SimpleNamespace(forward_only=True))


def test_a_term_has_one_objective() -> None:
    planner, one, other = StepPlanner(), object(), object()
    planner.add_term(one, "close", 0.5, ScheduleConfig(kind="linear", steps=4))
    planner.add_term(one, "close", 0.25, ScheduleConfig(kind="linear", steps=4))  # a second fit of the same objective
    assert [planner.terms["close"](step) for step in (0, 2, 9)] == [0.0, 0.125, 0.25]
    with pytest.raises(ValueError, match="Two objectives have a loss term 'close'"):
        planner.add_term(other, "close", 1.0, ScheduleConfig())
