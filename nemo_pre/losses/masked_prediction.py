"""The masked-prediction loss of LaVer (Latent Visual Reconstruction, arXiv 2512.06281, L_MIM)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemo_pre.losses.row_blocks import row_blocks


def masked_prediction_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    student_temperature: float,
    teacher_temperature: float,
    center: Tensor | None = None,
) -> tuple[Tensor, int]:
    """Cross-entropy between the teacher's and the student's distribution at the masked visual tokens, summed.

    ``L_MIM = -(1/n) sum_i softmax((z^_i - center) / tau_tea) . log softmax(z~_i / tau_stu)``; this returns the sum
    and ``n``. The paper writes the sum; the division is the objective's.

    Args:
        student_logits: ``[n, k]``, the head's output ``z~`` at the masked positions.
        teacher_logits: ``[n, k]``, the teacher's ``z^`` there. It is detached here.
        student_temperature, teacher_temperature: ``tau``; a smaller one makes a distribution sharper.
        center: ``[k]``, a running mean of the teacher's logits (the released code's option), or None. Detached here.

    Returns:
        ``loss_sum``, a scalar in nats, in float32 (float64 if an input is), and ``count = n``. With ``n = 0`` the sum
        is zero and still connected to ``student_logits``'s graph.

    Raises:
        ValueError: if the shapes differ or are not ``[n, k]`` and ``[k]``, or a temperature is not positive.
    """
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape [n, k], got {list(student_logits.shape)} "
            f"and {list(teacher_logits.shape)}."
        )
    if center is not None and center.shape != student_logits.shape[1:]:
        raise ValueError(f"center must have shape {list(student_logits.shape[1:])}, got {list(center.shape)}.")
    if not (student_temperature > 0 and teacher_temperature > 0):
        raise ValueError(f"Temperatures must be positive, got {student_temperature} and {teacher_temperature}.")
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    shift = None if center is None else center.detach().to(dtype)
    temperatures = (student_temperature, teacher_temperature)
    loss_sum: Tensor = _CrossEntropy.apply(student_logits, teacher_logits.detach(), shift, temperatures, dtype)
    return loss_sum, student_logits.shape[0]


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient on the way forward, some rows at a time: kept is one tensor like the student's logits,
    where autograd would keep two distributions in float32.

    With ``p = softmax(z / tau)`` and a target ``q``, ``d H(q, p) / dz = (p - q) / tau``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,
        teacher_logits: Tensor,
        center: Tensor | None,
        temperatures: tuple[float, float],
        dtype: torch.dtype,
    ) -> Tensor:
        student_temperature, teacher_temperature = temperatures
        loss_sum = student_logits.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(student_logits) if ctx.needs_input_grad[0] else None
        for rows in row_blocks(student_logits):
            # A bf16 softmax over thousands of channels at temperature 0.04 is noise.
            teacher = teacher_logits[rows].to(dtype)
            target = ((teacher if center is None else teacher - center) / teacher_temperature).softmax(dim=-1)
            log_prediction = (student_logits[rows].to(dtype) / student_temperature).log_softmax(dim=-1)
            loss_sum -= (target * log_prediction).sum()
            if gradient is not None:
                gradient[rows] = ((log_prediction.exp() - target) / student_temperature).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None, None
