import math

import pytest

from nemo_pre.objectives.scale import StepPlan, auxiliary_loss_scale, global_mean, gradient_divisor
from nemo_pre.objectives.schedules import ramp


def plan(loss_tokens=100, visual_tokens=40, images=4):
    return StepPlan(2, 64, {"loss_tokens": loss_tokens, "visual_tokens": visual_tokens, "images": images})


@pytest.mark.parametrize("per_token, ranks, expected", [(True, 8, 100.0), (False, 8, 8.0)])
def test_divisor_is_what_megatron_divides_by_afterwards(per_token, ranks, expected):
    assert gradient_divisor(plan(), per_token, ranks) == expected


def test_injected_gradient_survives_megatrons_division_as_weight_over_count():
    # Megatron sums and divides by 100 loss tokens; what must be left of a term over 40 tokens is 0.5 / 40.
    scale = auxiliary_loss_scale(0.5, 40, gradient_divisor(plan(), True, 8), None)
    assert scale / 100 == pytest.approx(0.5 / 40)


def test_no_loss_tokens_leave_the_sum_undivided():
    assert gradient_divisor(plan(loss_tokens=0), True, 8) == 1.0


def test_the_reported_value_is_the_global_mean_and_zero_of_nothing():
    assert global_mean(-3.0, 4) == -0.75
    assert global_mean(0.0, 0) == 0.0


def test_no_visual_tokens_give_a_zero_scale():
    assert auxiliary_loss_scale(0.5, 0, 100.0, None) == 0.0


def test_fp16_loss_scaling_multiplies_the_injected_gradient():
    assert auxiliary_loss_scale(0.5, 10, 1.0, grad_scale_func=lambda x: x * 1024) == pytest.approx(51.2)


@pytest.mark.parametrize(
    "kind, step, expected",
    [("constant", 0, 1.0), ("linear", 0, 0.2), ("linear", 5, 0.6), ("linear", 10, 1.0), ("linear", 99, 1.0),
     ("cosine", 0, 0.2), ("cosine", 5, 0.6), ("cosine", 2, 0.2 + 0.8 * (1 - math.cos(math.pi * 0.2)) / 2)],
)  # fmt: skip
def test_ramp(kind, step, expected):
    assert ramp(kind, step, start=0.2, steps=10) == pytest.approx(expected)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="constant, linear or cosine"):
        ramp("step", 0, 0.0, 10)
