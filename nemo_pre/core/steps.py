"""The forward step of our own chunks, as Megatron's schedules call it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state as ps
from torch import Tensor, nn

from nemo_pre.neva.chunk import unwrapped
from nemo_pre.parallel.micro_batch import forward_arguments, load_micro_batch

LossFunction = Callable[[Any], tuple[Tensor, Tensor, dict[str, Tensor]]]
LM_SUMS = "lm"  # of what a loss function reports: the loss summed over this rank's loss tokens, and their number


def forward_step(iterator: Iterator[Any], model: nn.Module) -> tuple[Any, LossFunction]:
    """Run a chunk of ours on the next micro-batch of :meth:`nemo_pre.core.objectives.Objectives.start_step`."""
    chunk: Any = unwrapped(model)
    batch = load_micro_batch(iterator, chunk.pre_process, chunk.post_process)
    return model(**forward_arguments(batch)), summed_loss


def summed_loss(output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The loss summed over loss tokens, their number, by which Megatron divides, and both to be reported."""
    losses, mask = output
    total, count = (losses * mask).sum(), mask.sum()
    sums = torch.stack([total.detach().double(), count.double()])
    return total, count.to(torch.int), {LM_SUMS: sums}


def language_loss(reported: list[dict[str, Tensor]]) -> float:
    """The mean loss of the global batch's loss tokens, the same on every rank; every rank must call it.

    Args:
        reported: what Megatron's schedule returned: on the last stage what :func:`summed_loss` reported of each
            micro-batch, elsewhere nothing.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())
    if ps.get_tensor_model_parallel_rank() == 0:  # the others report the same
        for each in reported:
            sums += each[LM_SUMS]
    torch.distributed.all_reduce(sums)
    total, count = sums.tolist()
    return total / count if count else float("nan")
