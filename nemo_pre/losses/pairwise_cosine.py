"""Cosines between the different tokens of a set, added up without a matrix of all pairs.

Linear in the tokens: the cosines of all pairs, those of a token with itself too, add up to the squared length of the
sum of the unit vectors.
"""

from __future__ import annotations

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor

from nemo_pre.device_copies import to_device

Size = TypeVar("Size", Tensor, int)


def pair_cosines(unit_sums: Tensor, sizes: Size) -> tuple[Tensor, Size]:
    """Sum of the cosines between different tokens of each set, and the number of such pairs, both orders counted.

    Args:
        unit_sums: ``[..., d]``, the sum of the unit vectors of each set's tokens.
        sizes: ``[...]``, how many tokens each set has.

    Returns:
        Two of the shape of ``sizes``: sums, 0 for a set of a single token, and numbers of pairs.
    """
    return unit_sums.square().sum(-1) - sizes, sizes * (sizes - 1)


def pair_cosines_within_images(tokens: Tensor, image: Tensor) -> tuple[Tensor, int]:
    """Sum over images of the cosines between different tokens of an image, and the number of such pairs.

    Args:
        tokens: ``[n, d]``, in any dtype: they are compared in float32.
        image: integers ``[n]``, the image of each token. Better on the CPU: on a GPU it waits for the device.

    Returns:
        A scalar in float32, and the number of pairs, both orders counted; zeros where no image has two tokens.
    """
    which, sizes = image.unique(return_inverse=True, return_counts=True)[1:]
    units = F.normalize(tokens.float(), dim=-1)
    unit_sums = units.new_zeros(len(sizes), tokens.shape[1]).index_add(0, to_device(which, units.device), units)
    cosines, _ = pair_cosines(unit_sums, to_device(sizes.float(), units.device))
    return cosines.sum(), int((sizes * (sizes - 1)).sum())
