"""Gradients that are not finite end the run in their step, on every rank, before weights are updated with them.

Megatron's own check (``check_for_nan_in_grad``) asks the device twice for every bucket of gradients on its way to
the other replicas, in the midst of the backward pass that hides that way, and ends only the rank that finds something.
Here each rank looks once at the gradients it is about to use, all of them: the norm that clipping computes leaves out
copies (of a tied embedding, of what tensor-parallel ranks hold alike), which a fault can reach by itself. One number
goes around all ranks, and the host waits for it once a step, where it waits for the norm anyway.
"""

from __future__ import annotations

from typing import Any

from nemo.lightning import MegatronOptimizerModule
from torch import Tensor

from nemo_pre.parallel.finite import NotFiniteError, finite_everywhere


class FiniteOptimizerModule(MegatronOptimizerModule):
    """NeMo's, whose optimizers raise :class:`NotFiniteError` instead of updating weights with such gradients."""

    def optimizers(self, model: Any) -> list[Any]:
        optimizers: list[Any] = super().optimizers(model)
        for optimizer in optimizers:
            refuse_not_finite(optimizer.mcore_optimizer)
        return optimizers


def refuse_not_finite(optimizer: Any) -> None:
    """Have a Megatron optimizer look at its gradients when they are reduced and not yet clipped. Every rank's must: at
    its step all of them raise :class:`NotFiniteError`, or none does."""
    prepare = optimizer.prepare_grads

    def prepare_and_look() -> bool:
        found: bool = prepare()
        if not finite_everywhere(_gradients(optimizer)):
            raise NotFiniteError("A gradient is NaN or infinite.")
        return found

    optimizer.prepare_grads = prepare_and_look


def _gradients(optimizer: Any) -> list[Tensor]:
    """What a Megatron optimizer updates its parameters with: of a distributed one this rank's part."""
    found = []
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        name = "decoupled_grad" if each.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 else "grad"
        gradients = (getattr(parameter, name, None) for parameter in each.get_parameters())
        found += [gradient for gradient in gradients if gradient is not None]
    return found
