"""Sums over ranks that hold parts of one thing, with a gradient: an image whose tokens are cut, or a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
        ctx.groups = groups
        return _sum(tensor, groups)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return _sum(grad_output, ctx.groups), None


def _sum(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    total = tensor.clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def sum_over_ranks(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """The sum of ``tensor`` over all ranks of ``groups``, the same on each; the gradient that reaches a rank's part is
    the sum of what all ranks did with the result.

    Every rank must call it, also with a part of zeros, and in the backward pass too. A loss that all ranks compute
    from the result must count once: :func:`share_of_replicated_sum`.

    Args:
        groups: such as :func:`nemo_pre.parallel.sequence_cut.sequence_shard_groups` (the ranks that share an image) or
            :func:`nemo_pre.parallel.sequence_cut.batch_shard_groups`.
    """
    return _SumOverRanks.apply(tensor, groups)


def share_of_replicated_sum(loss_sum: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """This rank's part of a sum that every rank of ``groups`` has computed whole, so that the parts add up to it."""
    for group in groups:
        loss_sum = loss_sum / dist.get_world_size(group)
    return loss_sum
