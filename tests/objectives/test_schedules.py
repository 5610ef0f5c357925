"""LaVer's schedules are those of its released code, and PRe's ramp ends where it should."""

from __future__ import annotations

import math

import pytest

from nemo_pre.objectives.laver.schedules import mask_ratio, teacher_momentum, update_interval, updates_teacher
from nemo_pre.objectives.schedules import ramp

T = 6250  # steps of LaVer's second stage


def test_the_mask_ratio_of_the_released_code():
    quarters = [mask_ratio("cosine", round(T * share), T, 0.05) for share in (0.25, 0.5, 0.75, 1)]
    assert quarters == pytest.approx([0.00732, 0.025, 0.04268, 0.05], abs=1e-5)
    assert mask_ratio("cosine", 0, T, 0.05) == 0
    assert mask_ratio("cosine", 2 * T, T, 0.05) == pytest.approx(0.05), "beyond the end it stays"


def test_a_delayed_mask_ratio_starts_after_an_eighth():
    assert [mask_ratio("delayed", step, 800, 0.05) for step in (0, 99, 100, 800)] == [0, 0, 0.05, 0.05]
    assert mask_ratio("constant", 0, 800, 0.05) == 0.05


def test_the_released_code_updates_its_teacher_fifty_times_and_keeps_0_2869_of_its_first_weights():
    interval = update_interval(1, 0.02, T)
    updates = [step for step in range(1, T + 1) if updates_teacher(step, interval)]
    assert len(updates) == 50
    kept = math.prod(teacher_momentum("cosine", step, T, 0.95) for step in updates)
    assert kept == pytest.approx(0.2869, abs=5e-5)


def test_a_constant_momentum_moves_the_teacher_every_step():
    assert teacher_momentum("constant", 17, T, 0.999) == 0.999
    assert [updates_teacher(step, update_interval(3, None, T)) for step in range(1, 7)] == [False, False, True] * 2
    assert update_interval(1, 0.02, 10) == 1, "a fraction of less than a step is a step"


def test_a_ramp_reaches_one():
    assert [ramp("linear", step, 0.5, 4) for step in (0, 2, 4, 9)] == [0.5, 0.75, 1, 1]


@pytest.mark.parametrize("schedule", [mask_ratio, teacher_momentum])
def test_an_unknown_kind_is_refused(schedule):
    with pytest.raises(ValueError, match="choose"):
        schedule("sawtooth", 0, T, 0.5)
