import math

import pytest
import torch

from nemo_pre.losses import predictive_loss


def slow_predictive_loss(prediction, anchor):
    total = 0.0
    for p, a in zip(prediction.tolist(), anchor.tolist(), strict=True):
        dot = sum(x * y for x, y in zip(p, a, strict=True))
        total -= dot / math.sqrt(sum(x * x for x in p)) / math.sqrt(sum(y * y for y in a))
    return total


def test_a_case_worked_by_hand():
    # cos = 1 (parallel), 0 (orthogonal), -1 (opposite), 0.6 (3-4-5 triangle): the sum of -cos is -0.6.
    prediction = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [3.0, 4.0]])
    anchor = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    loss_sum, count = predictive_loss(prediction, anchor)
    assert count == 4
    assert loss_sum.item() == pytest.approx(-0.6, abs=1e-6)


def test_value_equals_a_slow_reference_in_float64():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    anchor = torch.randn(17, 5, generator=generator, dtype=torch.float64)
    loss_sum, _ = predictive_loss(prediction, anchor)
    assert loss_sum.dtype == torch.float64
    assert loss_sum.item() == pytest.approx(slow_predictive_loss(prediction, anchor), abs=1e-12)


def test_gradient_equals_finite_differences():
    generator = torch.Generator().manual_seed(1)
    prediction = torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    anchor = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: predictive_loss(p, anchor)[0], prediction)


def test_the_anchor_receives_no_gradient():
    prediction = torch.randn(3, 4, requires_grad=True)
    anchor = torch.randn(3, 4, requires_grad=True)
    predictive_loss(prediction, anchor)[0].backward()
    assert anchor.grad is None
    assert prediction.grad is not None and prediction.grad.abs().sum() > 0


def test_bfloat16_inputs_are_summed_in_float32():
    prediction = torch.randn(4096, 8).bfloat16()
    loss_sum, _ = predictive_loss(prediction, prediction)
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(-4096, rel=1e-5)


def test_no_tokens_give_a_zero_that_is_connected_to_the_graph():
    prediction = torch.zeros(0, 4, requires_grad=True)
    loss_sum, count = predictive_loss(prediction, torch.zeros(0, 4))
    loss_sum.backward()
    assert count == 0 and loss_sum.item() == 0.0
    assert prediction.grad is not None and prediction.grad.shape == (0, 4)


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (12,)])
def test_mismatched_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"same shape \[n, d\]"):
        predictive_loss(torch.zeros(3, 4), torch.zeros(shape))
