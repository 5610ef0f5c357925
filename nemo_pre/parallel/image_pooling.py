"""Means over the visual tokens of an image whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.parallel.sums import sum_over_ranks


def sum_per_image(
    tokens: Tensor, image: Tensor, num_images: int, groups: Sequence[dist.ProcessGroup]
) -> tuple[Tensor, Tensor]:
    """Sum of each image's visual tokens over all ranks of ``groups``.

    Args:
        tokens: ``[n, d]``, this rank's visual tokens.
        image: ``[n]``, the image each belongs to, in ``[0, num_images)``.
        num_images: images of the micro-batch that have a token in the sequence.
        groups: process groups the sequence is cut over (tensor-parallel under sequence parallelism, context).

    Returns:
        ``[num_images, d]`` sums and ``[num_images, 1]`` numbers of tokens, in float32 or better and the same on every
        rank.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    sums = tokens.new_zeros(num_images, tokens.shape[1], dtype=dtype).index_add(0, image, tokens.to(dtype))
    counts = torch.zeros(num_images, 1, dtype=dtype, device=tokens.device)
    counts = counts.index_add(0, image, torch.ones(len(image), 1, dtype=dtype, device=tokens.device))
    return sum_over_ranks(sums, groups), sum_over_ranks(counts, groups)


def mean_per_image(tokens: Tensor, image: Tensor, num_images: int, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Mean ``[num_images, d]`` of each image's visual tokens; arguments and ranks as for :func:`sum_per_image`."""
    sums, counts = sum_per_image(tokens, image, num_images, groups)
    return sums / counts
