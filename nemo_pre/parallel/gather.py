"""Putting together what sequence or context parallelism has cut, with a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherFirstDimension(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        whole = part.new_empty(group.size() * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(whole, part.contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx: Any, grad_whole: Tensor) -> tuple[Tensor, None]:
        # Summed in float32 at least, as a flash-attention kernel accumulates the gradients of keys and values.
        terms = grad_whole.to(torch.promote_types(grad_whole.dtype, torch.float32)).contiguous()
        grad_part = terms.new_empty(terms.shape[0] // ctx.group.size(), *terms.shape[1:])
        dist.reduce_scatter_tensor(grad_part, terms, group=ctx.group)
        return grad_part.to(grad_whole.dtype), None


def gather_first_dimension(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``[n, ...]`` on every rank of ``group`` -> ``[size * n, ...]``, by rank; the gradient of a part is the sum of
    what all ranks did with it."""
    return _GatherFirstDimension.apply(part, group)
