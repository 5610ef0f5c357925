"""Data-parallel replicas that share the pictures out and put their sums together again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.diagnostics.moments import Moments

if TYPE_CHECKING:
    from nemo_pre.diagnostics.samples import DiagnosticData


@dataclass(frozen=True)
class Replicas:
    """``rank`` of ``size`` replicas, which all hold the same layers; ``objects`` is the group that pickles travel by.

    Attributes:
        counts: whether this replica's pictures are counted. With more replicas than pictures some repeat what another
            does, because a replica that does nothing would be waited for.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    objects: Any = None
    counts: bool = True

    def sharing(self, data: DiagnosticData) -> tuple[Replicas, DiagnosticData, list[int]]:
        """Who counts, every ``size``-th picture, and the places of those to fit on in the whole fit set."""
        parts = min([self.size, len(data.test), *([len(data.fit)] if data.fit else [])])
        mine = slice(self.rank % parts, None, parts)
        share = replace(data, fit=data.fit[mine], test=data.test[mine])
        return replace(self, counts=self.rank < parts), share, list(range(len(data.fit)))[mine]

    def mine(self, layers: list[int]) -> list[int]:
        """The layers whose eigenvalues this replica computes for all."""
        return layers[self.rank :: self.size]

    def gathered(self, part: Any) -> list[Any]:
        """Small things of all replicas that count."""
        return [each for counts, each in self.all_gathered((self.counts, part)) if counts]

    def all_gathered(self, part: Any) -> list[Any]:
        """Small things of all replicas."""
        if self.size == 1:
            return [part]
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, part, group=self.objects)
        return parts

    def summed(self, part: Moments) -> Moments:
        """Moments of the rows of all replicas."""
        if self.size == 1:
            return part
        held = part.count if self.counts else 0
        count = int(self._sum(torch.tensor([float(held)], dtype=torch.float64, device=part.mean.device)))
        if count == 0:
            return part
        mean, mean_y = (self._sum(own * held) / count for own in (part.mean, part.mean_y))
        own = part.scatter if self.counts else torch.zeros_like(part.scatter)
        between = torch.outer(part.mean - mean, part.mean_y - mean_y) * held
        return Moments(count, mean, mean_y, self._sum(own + between))

    def _sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values
