"""A step that has nothing of a metric logs nothing of it: no nan, no zero, not the last value; and is no spike."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection

from nemo_pre.callbacks.exact_match import Result
from nemo_pre.callbacks.loss_guard import LossGuard
from nemo_pre.callbacks.metrics import withdraw
from nemo_pre.config.compose import compose_run
from nemo_pre.data.scoring import Score
from nemo_pre.objectives.laver import LaVerConfig
from nemo_pre.objectives.laver.term import LaVerTerm

LOSS = "reduced_train_loss"


class Logging:
    """As much of a trainer as Lightning's own record of metrics needs."""

    def __init__(self) -> None:
        self._results = _ResultCollection(training=True)
        self.callback_metrics: dict[str, torch.Tensor] = {}
        self.logged_metrics: dict[str, torch.Tensor] = {}
        self.progress_bar_metrics: dict[str, float] = {}

    def log(self, **metrics: float) -> dict[str, torch.Tensor]:
        for name, value in metrics.items():
            self._results.log("training_step", name, torch.tensor(value), on_step=True, on_epoch=False, batch_size=1)
        return self._results.metrics(on_step=True)["log"]


def test_what_is_withdrawn_is_not_repeated_until_it_is_logged_again():
    trainer = Logging()
    trainer.callback_metrics = trainer.log(a=1.0, b=2.0)
    withdraw(trainer, ["a", "never logged"])
    assert "a" not in trainer.callback_metrics and trainer.log(b=3.0) == {"b": 3.0}
    assert trainer.log(a=4.0) == {"a": 4.0, "b": 3.0}


def guard() -> LossGuard:
    words = ["trainer.nan_action=roll_back", "trainer.spike_action=roll_back", "trainer.spike_window=5"]
    return LossGuard(compose_run(["experiment=digits_tiny", "output_dir=nowhere", *words]))


def judged(of: LossGuard, logged: Mapping[str, float]) -> str:
    return of._judge(SimpleNamespace(callback_metrics=logged, global_step=7))[0]


def test_a_batch_without_a_loss_token_is_no_spike_and_leaves_the_median_alone():
    of = guard()
    assert [judged(of, {LOSS: 2.0, "grad_norm": 1.0}) for _ in range(3)] == ["none"] * 3
    assert judged(of, {"grad_norm": 0.0}) == "none" and list(of._losses) == [2.0] * 3
    assert judged(of, {"grad_norm": math.nan}) == "roll_back", "its gradient is judged all the same"
    assert judged(of, {LOSS: math.nan, "grad_norm": 1.0}) == "roll_back", "a loss that diverges still counts"
    assert judged(of, {LOSS: 200.0, "grad_norm": 1.0}) == "roll_back"


def test_a_validation_without_an_answer_has_no_loss():
    nothing = Result({"all": Score(1, 2)}, 0.0, 0, 4, 1.0)
    assert "val/lm_loss" not in nothing.metrics() and "no answer has a loss" in str(nothing)


@pytest.mark.parametrize(("schedule", "every", "moves"), [("constant", 1, [1, 2, 3, 4]), ("cosine", 2, [2, 4])])
def test_the_teachers_momentum_is_of_the_step_that_it_follows(schedule, every, moves):
    """What a step logs is what the teacher moves with behind it: known before the step, used after it."""
    term = LaVerTerm(LaVerConfig(momentum=0.9, momentum_schedule=schedule, update_every=every))
    term._interval = every
    logged = {step: term._momentum_after(step, 4) for step in range(1, 5)}
    assert [step for step, momentum in logged.items() if momentum is not None] == moves
    if schedule == "cosine":
        assert logged[2] == pytest.approx(0.95) and logged[4] == 1.0
