"""The rank's side of the tests of branch tokens and sharded averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.parallel.branch_tokens import branch_tokens, whole_images
from nemo_pre.parallel.sequence_layout import local_positions
from nemo_pre.parallel.sharded_average import ShardedAverage, move_averages
from nemo_pre.parallel.token_streams import StreamShape, VisualBranch


def gather_images(branch: VisualBranch, whole_BSd: Tensor, tp: int, cp: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cut ``whole_BSd`` over the world, gather whole images, and send back a gradient of i + 1 for image i.

    Returns what this rank compares, its images, its positions of the branch, and the gradient of its part.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tp_rank, cp_rank = rank % tp, rank // tp
    shape = StreamShape(True, "2d", tp, cp, cp_rank)
    tp_groups = [dist.new_group([c * tp + t for t in range(tp)]) for c in range(cp)]
    cp_groups = [dist.new_group([c * tp + t for c in range(cp)]) for t in range(tp)]
    groups = [g for g, size in ((tp_groups[cp_rank], tp), (cp_groups[tp_rank], cp)) if size > 1]
    tokens = branch_tokens(branch, shape, tp_rank)
    here = local_positions(whole_BSd.shape[1], tp, tp_rank, cp, cp_rank)
    local = whole_BSd[:, here].transpose(0, 1).flatten(0, 1)[tokens.position].clone().requires_grad_()
    images = whole_images(local, tokens, len(here) * len(whole_BSd), groups)
    (images * (tokens.own_image[:, None] + 1)).sum().backward()
    assert local.grad is not None
    return images.detach(), tokens.own_image, tokens.own_masked, local.grad


def average_over_steps(start: list[Tensor], steps: list[list[Tensor]], momentum: float) -> list[Tensor]:
    dist.init_process_group("gloo")
    average = ShardedAverage(start, dist.group.WORLD)
    for tensors in steps:
        move_averages([(average, tensors)], momentum)
    assert average.shard.numel() <= -(-average.numel // dist.get_world_size()), "a rank holds its part only"
    return [tensor.clone() for tensor in average.split(average.gather(torch.float32))]
