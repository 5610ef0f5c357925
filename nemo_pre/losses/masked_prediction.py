"""The masked-prediction loss of LaVer (Latent Visual Reconstruction, arXiv 2512.06281, L_MIM)."""

from __future__ import annotations

import torch
from torch import Tensor


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
    # A bf16 softmax over thousands of channels at temperature 0.04 is noise.
    dtype = torch.promote_types(torch.promote_types(student_logits.dtype, teacher_logits.dtype), torch.float32)
    teacher = teacher_logits.detach().to(dtype)
    if center is not None:
        teacher = teacher - center.detach().to(dtype)
    target = (teacher / teacher_temperature).softmax(dim=-1)
    log_prediction = (student_logits.to(dtype) / student_temperature).log_softmax(dim=-1)
    return -(target * log_prediction).sum(), student_logits.shape[0]
