"""Checkpoints of a run: written by NeMo in Megatron's distributed format, found again by their step."""

from __future__ import annotations

from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from nemo_pre.config.compose import save_resolved
from nemo_pre.config.schema import RunConfig


def checkpoint_dir(config: RunConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


class RunCheckpoint(ModelCheckpoint):
    """Saves every ``checkpoint_every`` steps and at the end, keeping the newest ``keep_checkpoints``.

    The resolved config lies in each checkpoint, so that one can be read without the run it came from.
    """

    def __init__(self, config: RunConfig) -> None:
        super().__init__(
            dirpath=str(checkpoint_dir(config)),
            filename="{step}",
            monitor="step",
            mode="max",
            save_top_k=config.trainer.keep_checkpoints,
            every_n_train_steps=config.trainer.checkpoint_every or config.trainer.max_steps,
            save_last=False,
            save_optim_on_train_end=True,
            always_save_context=False,
            save_context_on_train_end=False,
        )
        self._config = config

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NeMo's moves files of earlier runs and writes the machine's git state; both need its own logger's folders.
        super(ModelCheckpoint, self).on_train_start(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NeMo's saves a "-last" copy here, or nothing; the last step is a checkpoint like the others.
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        # NeMo logs "step" as the number of the running step; a checkpoint is named by the steps it has done.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero:
            save_resolved(self._config, Path(filepath).with_suffix("") / "config.yaml")


def newest_checkpoint(directory: Path) -> str | None:
    """The newest complete checkpoint in ``directory``, or None."""
    steps = {
        int(path.name.removeprefix("step=")): path
        for path in directory.glob("step=*")
        if path.is_dir() and path.name.removeprefix("step=").isdigit()
        if not ModelCheckpoint.is_checkpoint_unfinished(path)
    }
    return str(steps[max(steps)]) if steps else None
