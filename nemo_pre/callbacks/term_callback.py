"""A loss term in a NeMo run: calls it when it is due, and records what it returns."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.metrics import withdraw
from nemo_pre.callbacks.step_planning import step_planning
from nemo_pre.callbacks.training import NeMoTraining
from nemo_pre.objectives.objective import Objective
from nemo_pre.terms.term import Term


class TermCallback(Callback):
    """Adds ``term`` to a NeVA run of :class:`nemo_pre.nemo.module.VisualNevaModel`.

    Raises:
        ValueError: at setup, where the term cannot be added to this model.
    """

    def __init__(self, term: Term) -> None:
        self.term = term
        self._named: set[str] = set()  # metrics that some step has had
        self._absent: set[str] = set()  # those of them that the step at hand has not

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.term.prepare(pl_module.config)
        step_planning(trainer).planner.add(self.term)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.term.install(NeMoTraining(trainer))

    def on_megatron_microbatches_start(self, step: Any) -> None:
        self.term.start_step()

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        plan = step_planning(step.trainer).plan
        assert plan is not None
        found = self.term.end_step(plan)
        self._named |= found.keys()
        self._absent = self._named - found.keys()
        for name, value in found.items():
            step.trainer.lightning_module.log(name, torch.as_tensor(value, dtype=torch.float64), batch_size=1)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        withdraw(trainer, self._absent)
        self.term.after_update(NeMoTraining(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.term.finish()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.term.remove()


def callback_of(objective: type[Objective]) -> type[TermCallback]:
    """The callback that adds one objective to any trainer: ``Callback(options, seed=0)``."""

    def __init__(self: TermCallback, options: Any, seed: int = 0) -> None:
        TermCallback.__init__(self, objective.term_class()(options, seed))

    body = {"__init__": __init__, "__doc__": f"Adds {objective.title} to a NeVA run; takes its options and a seed."}
    return type(f"{objective.__name__}Callback", (TermCallback,), body)
