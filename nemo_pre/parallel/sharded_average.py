"""An exponential moving average of parameters in float32, of which every data-parallel rank holds a part.

Bytes per parameter and rank: 4 / ranks for the average, and what the copy that computes needs (2 in bf16).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ShardedAverage:
    """The average of some tensors, as one flat float32 vector cut into equal parts over ``group``.

    Args:
        source: the tensors that are averaged; the average starts at their values.
        group: ranks that hold the same tensors (data and context parallel).
    """

    def __init__(self, source: Sequence[Tensor], group: dist.ProcessGroup) -> None:
        self.group = group
        self.shapes = [tuple(tensor.shape) for tensor in source]
        self.numel = sum(tensor.numel() for tensor in source)
        part = -(-self.numel // group.size())
        self.start, self.stop = group.rank() * part, min((group.rank() + 1) * part, self.numel)
        self.shard = torch.zeros(part, dtype=torch.float32, device=source[0].device)
        self.load(source)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor]) -> None:
        """Set the average; every rank is given the full tensors and keeps its part."""
        for piece, value in self.pieces(values):
            piece.copy_(value)

    def pieces(self, tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Views of this rank's part of the average, each with the view of the tensor it averages."""
        found, offset = [], 0
        for tensor, shape in zip(tensors, self.shapes, strict=True):
            assert tuple(tensor.shape) == shape, f"{tuple(tensor.shape)} given, {shape} expected"
            first, last = max(self.start, offset), min(self.stop, offset + tensor.numel())
            if first < last:
                mine = self.shard[first - self.start : last - self.start]
                found.append((mine, tensor.detach().reshape(-1)[first - offset : last - offset]))
            offset += tensor.numel()
        return found

    @torch.no_grad()
    def gather(self, dtype: torch.dtype) -> Tensor:
        """The whole average, flat, in ``dtype``; rounded before it is sent."""
        out = torch.empty(self.padded, dtype=dtype, device=self.shard.device)
        self.start_gather(out).wait()
        return out

    @torch.no_grad()
    def start_gather(self, out: Tensor) -> dist.Work:
        """:meth:`gather` into ``out`` of :attr:`padded` elements, while other things are computed. Until the work is
        waited for nobody may read ``out`` or move the average."""
        return dist.all_gather_into_tensor(out, self.shard.to(out.dtype), group=self.group, async_op=True)

    @property
    def padded(self) -> int:
        return self.shard.numel() * self.group.size()

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a gathered vector in the tensors' shapes."""
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = flat[: self.numel].split(sizes)
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@torch.no_grad()
def move_averages(averages: Sequence[tuple[ShardedAverage, Sequence[Tensor]]], momentum: float) -> None:
    """``average = momentum * average + (1 - momentum) * tensor`` for all of them, each element read and written once.

    Moves 12 bytes per parameter of the rank's part where the tensors are float32, 10 where they are bf16.
    """
    pairs = [pair for average, tensors in averages for pair in average.pieces(tensors)]
    alike = [(mine, theirs) for mine, theirs in pairs if theirs.dtype == torch.float32]
    if alike:
        torch._foreach_lerp_([mine for mine, _ in alike], [theirs for _, theirs in alike], 1.0 - momentum)
    for mine, theirs in pairs:
        if theirs.dtype == torch.float32:
            continue
        if mine.is_cuda:
            weight = torch.full((), 1.0 - momentum, device=mine.device)  # a number would compile anew when it changes
            _compiled_lerp()(mine, theirs, weight)
            continue
        for mine_part, theirs_part in zip(mine.split(CACHE_ELEMENTS), theirs.split(CACHE_ELEMENTS), strict=True):
            mine_part.lerp_(theirs_part.float(), 1.0 - momentum)


CACHE_ELEMENTS = 1 << 16  # elements whose float32 copy stays in a CPU core's cache


def _lerp(average: Tensor, tensor: Tensor, weight: Tensor) -> None:
    average.lerp_(tensor.float(), weight)


@cache
def _compiled_lerp() -> Any:
    """One kernel that converts on the way: PyTorch's own lerp wants one dtype."""
    return torch.compile(_lerp, dynamic=True)
