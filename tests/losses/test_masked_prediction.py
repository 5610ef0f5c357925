import math

import pytest
import torch

from nemo_pre.losses import masked_prediction_loss


def slow(student, teacher, tau_student, tau_teacher, center=None):
    total = torch.zeros((), dtype=torch.float64)
    for z_student, z_teacher in zip(student, teacher, strict=True):
        shifted = z_teacher if center is None else z_teacher - center
        weights = [math.exp(float(value) / tau_teacher) for value in shifted]
        target = [weight / sum(weights) for weight in weights]
        normaliser = sum((value / tau_student).exp() for value in z_student).log()
        for p, value in zip(target, z_student, strict=True):
            total = total - p * (value / tau_student - normaliser)
    return total


def logits(n=5, k=7, seed=0, scale=0.3):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator, dtype=torch.float64) * scale for _ in range(2)]


def test_two_channels_by_hand():
    # The teacher is certain of channel 0 to within e^-40; the student gives it 1/(1 + e^-2).
    student, teacher = torch.tensor([[0.2, 0.0]]), torch.tensor([[4.0, 0.0]])
    loss, count = masked_prediction_loss(student, teacher, 0.1, 0.1)
    assert count == 1
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-6)


def test_a_student_that_agrees_has_the_teachers_entropy():
    z, _ = logits(n=1)
    p = (z / 0.5).softmax(-1)
    loss, _ = masked_prediction_loss(z, z, 0.5, 0.5)
    torch.testing.assert_close(loss, torch.special.entr(p).sum())


@pytest.mark.parametrize("centred", [False, True])
def test_value_and_gradient_equal_plain_loops_in_float64(centred):
    student, teacher = logits()
    center = torch.linspace(-0.2, 0.3, 7, dtype=torch.float64) if centred else None
    student.requires_grad_()
    loss, count = masked_prediction_loss(student, teacher, 0.1, 0.04, center)
    expected = slow(student, teacher, 0.1, 0.04, center)
    assert count == 5 and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,), (right,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, right, rtol=1e-10, atol=1e-12)


def test_only_the_student_gets_a_gradient():
    student, teacher = (z.requires_grad_() for z in logits())
    center = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    masked_prediction_loss(student, teacher, 0.1, 0.04, center)[0].backward()
    assert student.grad is not None and student.grad.any()
    assert teacher.grad is None and center.grad is None


def test_shifting_all_of_a_tokens_logits_changes_nothing_and_the_centre_does():
    student, teacher = logits()
    loss = masked_prediction_loss(student, teacher, 0.1, 0.04)[0]
    torch.testing.assert_close(masked_prediction_loss(student + 3, teacher - 2, 0.1, 0.04)[0], loss)
    center = torch.linspace(-1, 1, 7, dtype=torch.float64)
    assert not torch.isclose(masked_prediction_loss(student, teacher, 0.1, 0.04, center)[0], loss)


def test_no_masked_token_gives_zero_that_is_still_connected():
    student = torch.zeros(0, 7, requires_grad=True)
    loss, count = masked_prediction_loss(student, torch.zeros(0, 7), 0.1, 0.04)
    assert loss.item() == 0 and count == 0
    loss.backward()
    assert student.grad is not None


def test_bf16_is_summed_in_float32():
    student, teacher = (z.bfloat16() for z in logits(n=64, k=32))
    loss, _ = masked_prediction_loss(student, teacher, 0.1, 0.04)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), slow(student.double(), teacher.double(), 0.1, 0.04), rtol=1e-5, atol=0)


def test_wrong_shapes_and_temperatures_are_refused():
    z = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"same shape \[n, k\]"):
        masked_prediction_loss(z, torch.zeros(3, 5), 0.1, 0.04)
    with pytest.raises(ValueError, match=r"same shape \[n, k\]"):
        masked_prediction_loss(z[0], z[0], 0.1, 0.04)
    with pytest.raises(ValueError, match="center must have shape"):
        masked_prediction_loss(z, z, 0.1, 0.04, torch.zeros(3))
    with pytest.raises(ValueError, match="must be positive"):
        masked_prediction_loss(z, z, 0.1, 0.0)
