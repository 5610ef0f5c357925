"""NeMo's trainer as terms see one."""

from __future__ import annotations

from typing import Any

from nemo_pre.neva.model import MCoreVisualNevaModel, model_chunks


class NeMoTraining:
    """A :class:`nemo_pre.terms.training.Training` out of NeMo's trainer."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    @property
    def chunks(self) -> list[MCoreVisualNevaModel]:
        return model_chunks(self._trainer)

    @property
    def steps_done(self) -> int:
        return self._trainer.global_step

    @property
    def max_steps(self) -> int:
        return self._trainer.max_steps
