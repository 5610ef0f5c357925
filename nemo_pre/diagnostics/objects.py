"""The pictures of a composed scene, each by itself: what its visual tokens hold, and what they would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MOST_OBJECTS = 5  # that a scene shows


def coverage(instances_PK: Tensor, numbers: Sequence[int]) -> Tensor:
    """``[objects, P]``: of each object, the share of its pixels that lies in each patch; zeros for one that is not
    there.

    Args:
        instances_PK: ``[patches, pixels]`` the object's number at each pixel.
        numbers: of the objects asked for.
    """
    pixels = torch.stack([(instances_PK == number).sum(1) for number in numbers]).float()
    return pixels / pixels.sum(1, keepdim=True).clamp(min=1)
