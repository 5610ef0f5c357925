"""Plans every optimizer step before its first micro-batch runs: NeMo's side of :mod:`nemo_pre.terms.step_planner`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.metrics import withdraw
from nemo_pre.callbacks.progress import LM_LOSS
from nemo_pre.callbacks.training import NeMoTraining
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.micro_batch import raw_batch
from nemo_pre.terms.step_planner import StepPlanner


class StepPlanning(Callback):
    """Reads a step's micro-batches ahead, has them planned, and hands them on.

    The micro-batches of a step are held in host memory until they have run.

    Args:
        lm_weight: weight of the language model's loss.

    Attributes:
        planner: terms add themselves to it.
        plan: of the step at hand.
        items: the step's micro-batches as the loader gave them, planned.
    """

    def __init__(self, lm_weight: float = 1.0) -> None:
        self.planner = StepPlanner(lm_weight)
        self.plan: StepPlan | None = None
        self.items: list[Any] = []

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """Plan the step.

        Raises:
            ValueError: it is one of Lightning's validation.
        """
        if step.forward_only:
            raise ValueError(
                "Lightning's validation is not planned, and its values would be recorded as training's: set "
                "limit_val_batches=0 and validate with nemo_pre.callbacks.exact_match."
            )
        self.items = items = [next(step.data) for _ in range(step.num_microbatches)]
        batches = [raw_batch(item) for item in items]
        self.plan, step.seq_length = self.planner.plan(NeMoTraining(step.trainer), batches)
        step.data = iter(items)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """A batch without a loss token has no loss: NeMo's is a sum of nothing by nothing."""
        assert self.plan is not None
        if self.plan.loss_tokens == 0:
            withdraw(trainer, [LM_LOSS])


def step_planning(trainer: Any) -> StepPlanning:
    """The trainer's callback that plans steps; one is added where none is."""
    for callback in trainer.callbacks:
        if isinstance(callback, StepPlanning):
            return callback
    trainer.callbacks.append(StepPlanning())
    return trainer.callbacks[-1]
