"""Gram-anchoring, clipped or symmetric, of LaVer (Latent Visual Reconstruction, arXiv 2512.06281, L_CGA and L_GA); the
symmetric one is also the relational form of VIRAL (arXiv 2509.07979)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_pre.device_copies import to_device


def gram_anchoring_loss(
    student: Tensor, teacher: Tensor, image_ids: Tensor, clipped: bool = True
) -> tuple[Tensor, int]:
    """Squared difference between the student's and the teacher's cosine similarities within each image, summed.

    ``G(Z) = Norm(Z) Norm(Z)^T``; ``L_CGA = || max(0, G(Z~) - G(Z^)) ||_F^2`` punishes only what is more alike for the
    student than for the teacher, ``L_GA = || G(Z~) - G(Z^) ||_F^2`` any difference. One matrix per image.

    Memory, forward and backward, is that of the largest image's matrix plus ``[n, k]``.

    Args:
        student: ``[n, k]`` visual tokens ``Z~``.
        teacher: ``[n, j]`` the teacher's ``Z^`` of the same tokens, of any width: only its angles are compared. It is
            detached here.
        image_ids: integers ``[n]``, the image of each token, in any order; one id for all tokens compares them all.
            Better on the CPU: on a GPU, cutting by image waits for the device.
        clipped: L_CGA rather than L_GA.

    Returns:
        ``loss_sum``, a scalar in float32 (float64 if an input is), and ``count``, the number of matrix entries summed
        (the sum over images of their tokens squared). With ``n = 0`` the sum is zero and still connected to
        ``student``'s graph.

    Raises:
        ValueError: if the shapes are not ``[n, k]``, ``[n, j]`` and ``[n]``.
    """
    rows = student.shape[:1]
    if student.ndim != 2 or teacher.ndim != 2 or teacher.shape[:1] != rows or image_ids.shape != rows:
        raise ValueError(
            f"student and teacher must have the shapes [n, k] and [n, j], and image_ids [n], got "
            f"{list(student.shape)}, {list(teacher.shape)} and {list(image_ids.shape)}."
        )
    dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    by_image = image_ids.argsort(stable=True)
    sizes = image_ids.unique(return_counts=True)[1].tolist()
    order = to_device(by_image, student.device)
    unit_student = F.normalize(student.to(dtype), dim=-1)[order]
    unit_teacher = F.normalize(teacher.detach().to(dtype), dim=-1)[order]
    loss_sum: Tensor = _SquaredGramDifference.apply(unit_student, unit_teacher, sizes, clipped)
    return loss_sum, sum(size * size for size in sizes)


class _SquaredGramDifference(torch.autograd.Function):
    """Computes the gradient on the way forward, image by image, so that no Gram matrix is kept.

    With ``D = G(S) - G(T)``, clipped or not, ``d sum(D^2) / dS = 4 D S`` since ``D`` is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, sizes: list[int], clipped: bool) -> Tensor:
        loss_sum = student.new_zeros(())
        gradient = torch.empty_like(student)
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            own, target = student[rows], teacher[rows]
            difference = own @ own.T - target @ target.T
            if clipped:
                difference.clamp_(min=0)
            loss_sum += difference.square().sum()
            gradient[rows] = 4 * (difference @ own)
            start += size
        ctx.save_for_backward(gradient)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None, None, None
