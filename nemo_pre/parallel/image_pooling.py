"""Means over the visual tokens of an image whose tokens are spread over ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.parallel.sums import sum_over_ranks


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
    sums, counts = sum_over_ranks(sums, groups), sum_over_ranks(counts, groups)
    return sums / counts.clamp(min=1), counts.squeeze(1) > 0
