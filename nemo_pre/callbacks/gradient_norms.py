"""The gradient norm of every loss term by itself, on request: which term pulls how hard."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.metrics import record_metrics
from nemo_pre.callbacks.step_planning import step_planning
from nemo_pre.callbacks.term_callback import TermCallback
from nemo_pre.parallel.micro_batch import raw_batch


class GradientNormsCallback(Callback):
    """Every ``every`` steps, before the step, runs its micro-batches once per term with all other weights 0.

    The norm is that of the weighted term's gradient in all trained parameters, reduced over all ranks as Megatron
    reduces the step's own; it is recorded as ``grad_norm/<term>``. Such a step costs one more forward and backward
    pass per term. It must come after the objectives' callbacks.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._norms: dict[str, float] = {}

    def on_megatron_microbatches_start(self, step: Any) -> None:
        if (step.trainer.global_step + 1) % self.every:
            return
        items = step_planning(step.trainer).items
        batches = [raw_batch(item) for item in items]
        planned = [batch["micro_batch"] for batch in batches]
        for term, weight in planned[0].plan.weights.items():
            alone = replace(planned[0].plan, weights={**dict.fromkeys(planned[0].plan.weights, 0.0), term: weight})
            for batch, micro_batch in zip(batches, planned, strict=True):
                batch["micro_batch"] = replace(micro_batch, plan=alone)
            step.data = iter(items)
            step()
            self._norms[f"grad_norm/{term}"] = _take_gradient_norm(step.trainer)
            for callback in step.trainer.callbacks:
                if isinstance(callback, TermCallback):
                    callback.term.forget_step()
        for batch, micro_batch in zip(batches, planned, strict=True):
            batch["micro_batch"] = micro_batch
        step.data = iter(items)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._norms:
            record_metrics(trainer, self._norms)
            self._norms = {}


def _take_gradient_norm(trainer: Trainer) -> float:
    """The norm of the gradients that are there, which are then cleared."""
    optimizers = [optimizer.mcore_optimizer for optimizer in trainer.optimizers]
    for optimizer in optimizers:
        optimizer.prepare_grads()
    norm = sum(float(optimizer.get_grad_norm()) ** 2 for optimizer in optimizers) ** 0.5
    for chunk in trainer.strategy.model:
        chunk.zero_grad_buffer()
    for optimizer in optimizers:
        optimizer.zero_grad()
    return norm
