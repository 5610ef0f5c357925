"""Means over the visual tokens of an image whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    """Sum over groups; each rank's gradient is the sum of all ranks' gradients of the shared result."""

    @staticmethod
    def forward(ctx, tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
        ctx.groups = groups
        return _sum(tensor, groups)

    @staticmethod
    def backward(ctx, grad_output: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_output, ctx.groups), None


def _sum(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    total = tensor.clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def mean_per_image(
    tokens: Tensor, image: Tensor, num_images: int, groups: Sequence[dist.ProcessGroup]
) -> tuple[Tensor, Tensor]:
    """Mean of each image's visual tokens over all ranks of ``groups``.

    Args:
        tokens: ``[n, d]``, this rank's visual tokens.
        image: ``[n]``, the image each belongs to, in ``[0, num_images)``.
        num_images: images of the micro-batch.
        groups: process groups the sequence is cut over (tensor-parallel under sequence parallelism, context).

    Returns:
        ``[num_images, d]`` means in float32 or better, the same on every rank, and a boolean ``[num_images]``
        that is False where an image has no token left.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    sums = tokens.new_zeros(num_images, tokens.shape[1], dtype=dtype).index_add(0, image, tokens.to(dtype))
    counts = torch.zeros(num_images, 1, dtype=dtype, device=tokens.device)
    counts = counts.index_add(0, image, torch.ones(len(image), 1, dtype=dtype, device=tokens.device))
    sums, counts = _SumOverRanks.apply(sums, groups), _sum(counts, groups)
    return sums / counts.clamp(min=1), counts.squeeze(1) > 0


def share_of_replicated_sum(loss_sum: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """This rank's part of a sum that every rank of ``groups`` has computed whole, so that the parts add up to it."""
    for group in groups:
        loss_sum = loss_sum / dist.get_world_size(group)
    return loss_sum
