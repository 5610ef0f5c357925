"""Adding a loss's gradient to the backward pass of a stage that does not return a loss."""

from __future__ import annotations

import torch
from torch import Tensor


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.loss_like = (loss.dtype, loss.device)
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss_like
        return grad_output, torch.ones((), dtype=dtype, device=device)


def backpropagate_with(hidden_states: Tensor, loss: Tensor) -> Tensor:
    """``hidden_states``, unchanged in value; whatever backpropagates through it also backpropagates ``loss``.

    Megatron computes losses on the last pipeline stage only. An auxiliary loss of an earlier stage, scaled
    as :func:`nemo_pre.objectives.scale.auxiliary_loss_scale` says, reaches the parameters through this instead. The
    idea is that of Megatron's ``MoEAuxLossAutoScaler``, whose scale is set only for mixture-of-experts models, and in
    0.15 has no context-parallel factor.
    """
    from megatron.core.utils import make_viewless_tensor

    # Pipeline schedules free a stage's output, which must therefore not be a view of another tensor.
    return make_viewless_tensor(_WithLoss.apply(hidden_states, loss), requires_grad=True, keep_graph=True)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output * ctx.factor, None


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """``tensor``, unchanged in value; gradients through it are multiplied by ``factor``."""
    return tensor if factor == 1.0 else _ScaledGradient.apply(tensor, factor)
