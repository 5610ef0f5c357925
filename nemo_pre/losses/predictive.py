"""The predictive loss of PRe (Predictive Regularization, arXiv 2603.20808, eq. 1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_pre.losses.row_blocks import row_blocks

EPSILON = 1e-8  # shorter vectors count as this long, as in torch's cosine similarity


def predictive_loss(prediction: Tensor, anchor: Tensor) -> tuple[Tensor, int]:
    """Negative cosine similarity between predicted and stop-gradient visual tokens, summed.

    ``L_PRe = -(1/n) sum_i cos(f_pred(h_i^l), stopgrad(h_i^0))``; this returns the sum and ``n``.

    Args:
        prediction: ``[n, d]``, the head's output ``f_pred(h^l)`` for ``n`` visual tokens.
        anchor: ``[n, d]``, the visual tokens ``h^0`` that entered the language model. It is detached here.

    Returns:
        ``loss_sum``, a scalar in float32 (float64 if an input is), in ``[-n, n]``, and ``count = n``. With
        ``n = 0`` the sum is zero and still connected to ``prediction``'s graph.

    Raises:
        ValueError: if the shapes differ or are not ``[n, d]``.
    """
    if prediction.ndim != 2 or prediction.shape != anchor.shape:
        raise ValueError(
            f"prediction and anchor must have the same shape [n, d], got {list(prediction.shape)} and "
            f"{list(anchor.shape)}."
        )
    loss_sum: Tensor = _NegativeCosine.apply(prediction, anchor.detach())
    return loss_sum, prediction.shape[0]


class _NegativeCosine(torch.autograd.Function):
    """Computes the gradient on the way forward, some rows at a time: kept is one tensor like the prediction, where
    autograd would keep both inputs in float32 and their products.

    With ``p^ = p / |p|``, ``d cos(p, a) / dp = (a^ - cos(p, a) p^) / |p|``.
    """

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, anchor: Tensor) -> Tensor:
        # A bf16 cosine has three significant digits: too coarse to sum over thousands of tokens.
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, anchor.dtype), torch.float32)
        loss_sum = prediction.new_zeros((), dtype=dtype)
        gradient = torch.empty_like(prediction) if ctx.needs_input_grad[0] else None
        for rows in row_blocks(prediction):
            length = torch.linalg.vector_norm(prediction[rows], dim=-1, keepdim=True, dtype=dtype)
            unit = prediction[rows].to(dtype) / length.clamp(min=EPSILON)
            unit_anchor = F.normalize(anchor[rows].to(dtype), dim=-1, eps=EPSILON)
            cosine = (unit * unit_anchor).sum(dim=-1, keepdim=True)
            loss_sum -= cosine.sum()
            if gradient is not None:
                turned = torch.where(length > EPSILON, cosine, 0) * unit - unit_anchor
                gradient[rows] = (turned / length.clamp(min=EPSILON)).to(gradient.dtype)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss_sum

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grad_output * gradient, None
