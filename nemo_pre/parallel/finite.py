"""Whether numbers are finite on all ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class NotFiniteError(ArithmeticError):
    """A gradient of the step at hand is NaN or infinite, on this rank or another."""


@torch.no_grad()
def finite_everywhere(tensors: list[Tensor]) -> bool:
    """Whether the norms of all ranks' ``tensors``, of which a rank may have none, are finite. Collective over all
    ranks; the host waits for the answer."""
    finite = torch.ones((), device=torch.cuda.current_device())
    if tensors:
        norms = [norm.float() for norm in torch._foreach_norm(tensors)]
        finite = torch.isfinite(torch.stack(norms)).all().float()
    dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite.item())
