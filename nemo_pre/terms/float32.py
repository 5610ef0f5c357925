"""Layers of heads that compute in float32, whatever the run's precision: of bf16 weights and hidden states.

A bf16 head rounds between its layers and at its output, and a softmax at temperature 0.04 makes 25 times as much of
it. Weights stay in the model's dtype, so that Megatron's buffers, optimizer and checkpoints see nothing special, and
are widened where they are used: what is computed is the gradient of the model as it is rounded. It leaves in the dtype
of weights and hidden states, which rounds it once.

In a bf16 run on a GPU the products are TF32's: float32 sums of factors with 10 bits of mantissa, 3 more than bf16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Float32Linear(nn.Linear):
    """A linear layer on ``[n, in_features]`` of any dtype, which computes and returns float32 (float64 if its weights
    are). For backward it keeps its input as it came, and no wide copy of its weights."""

    def forward(self, values: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        if self.weight.dtype == dtype:
            return super().forward(values.to(dtype))
        return _WideLinear.apply(values, self.weight, self.bias, dtype)


class Float32LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes and returns float32 (float64 if its weights are), of values of any dtype."""

    def forward(self, values: Tensor) -> Tensor:
        dtype = wide(self.weight.dtype)
        return F.layer_norm(
            values.to(dtype), self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps
        )


def wide(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(values, weight)
        ctx.has_bias = bias is not None
        with _tensor_cores(values):
            return F.linear(values.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors
        grad_values = grad_weight = None
        with _tensor_cores(values):
            if ctx.needs_input_grad[0]:
                grad_values = (grad_output @ weight.to(grad_output.dtype)).to(values.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_output.T @ values.to(grad_output.dtype)).to(weight.dtype)
        grad_bias = grad_output.sum(0).to(weight.dtype) if ctx.has_bias and ctx.needs_input_grad[2] else None
        return grad_values, grad_weight, grad_bias, None


@contextmanager
def _tensor_cores(where: Tensor) -> Iterator[None]:
    """TF32 for the products inside, on a GPU: float32's own units have a fifteenth of the bf16 rate of an H100."""
    if not where.is_cuda:
        yield
        return
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
