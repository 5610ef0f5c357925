"""The rank's side of the tests of branch tokens and sharded averages."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.losses import gram_anchoring_loss
from nemo_pre.parallel.branch_tokens import branch_tokens
from nemo_pre.parallel.image_tokens import image_tokens, whole_images
from nemo_pre.parallel.sequence_layout import SequenceLayout, local_positions
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


def relational_terms(
    layout: SequenceLayout, student_BSd: Tensor, teacher_BSt: Tensor, tp: int, cp: int
) -> tuple[float, int, Tensor, Tensor]:
    """This rank's share of the relational term of samples that are cut over the world.

    Returns sum and count of the images it compares, the gradient of its part of the student, and its positions.
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    tp_rank, cp_rank = rank % tp, rank // tp
    tp_groups = [dist.new_group([c * tp + t for t in range(tp)]) for c in range(cp)]
    cp_groups = [dist.new_group([c * tp + t for c in range(cp)]) for t in range(tp)]
    groups = [g for g, size in ((tp_groups[cp_rank], tp), (cp_groups[tp_rank], cp)) if size > 1]
    tokens = image_tokens(layout, tp, tp_rank, cp, cp_rank).to("cpu")
    here = local_positions(layout.sequence_length, tp, tp_rank, cp, cp_rank)
    places = len(here) * len(student_BSd)
    student = student_BSd[:, here].transpose(0, 1).flatten(0, 1).clone().requires_grad_()
    teacher = teacher_BSt[:, here].transpose(0, 1).flatten(0, 1)
    whole = [whole_images(part[tokens.position], tokens, places, groups) for part in (student, teacher)]
    loss_sum, count = gram_anchoring_loss(*whole, tokens.own_image, clipped=False)
    loss_sum.backward()
    assert student.grad is not None
    return loss_sum.item(), count, student.grad.view(len(here), len(student_BSd), -1).transpose(0, 1), here


def average_over_steps(start: list[Tensor], steps: list[list[Tensor]], momentum: float) -> list[Tensor]:
    dist.init_process_group("gloo")
    average = ShardedAverage(start, dist.group.WORLD)
    for tensors in steps:
        move_averages([(average, tensors)], momentum)
    assert average.shard.numel() <= -(-average.numel // dist.get_world_size()), "a rank holds its part only"
    return [tensor.clone() for tensor in average.split(average.gather(torch.float32))]
