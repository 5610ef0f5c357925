"""Copies from the host's memory to the device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

WAITED_FOR = {"cuda"}  # devices to which pageable memory goes behind whatever they have still to do


def to_device(tensor: Tensor, device: torch.device | str | int) -> Tensor:
    """``tensor`` on ``device``; what is computed there from now on finds it, and the host goes on meanwhile.

    CUDA copies pageable memory by way of pinned memory of its own, and may let the host wait for the stream before it
    does. PyTorch keeps the pinned memory that is taken here, and gives it to another tensor once the copy is done.

    Args:
        device: an ordinal is a GPU's.
    """
    kind = "cuda" if isinstance(device, int) else torch.device(device).type
    if kind in WAITED_FOR and tensor.device.type == "cpu" and tensor.numel():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
