"""Checkpoints of a run: written by NeMo in Megatron's distributed format, found again by their step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from nemo.lightning.pytorch.callbacks import ModelCheckpoint

from nemo_pre.callbacks.progress import progress_of
from nemo_pre.config.compose import save_resolved
from nemo_pre.config.run import RunConfig
from nemo_pre.run_files.checkpoints import (
    checkpoint_dir,
    damage_of,
    newest_step,
    record_progress,
    record_sizes,
    run_checkpoints,
    step_of,
)
from nemo_pre.run_files.checksums import record_checksums

NO_ROOM = (  # what Linux says, and torch's writer when it could not write as much as it wanted
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "inline_container",
)


class RunCheckpoint(ModelCheckpoint):
    """Saves every ``checkpoint_every`` steps and at the end, keeping the newest ``keep_checkpoints``.

    The resolved config lies in each checkpoint, so that one can be read without the run it came from, where in the run
    it is, and the sizes and checksums of its files, so that one that was cut or changed is known. Which checkpoints
    there are to keep or remove is what lies in the directory, not what a checkpoint remembers, which has no part in it
    where the options changed.
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
        self._take_stock(trainer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass  # on_train_start looks into the directory

    def _take_stock(self, trainer: Trainer) -> None:
        """Tell Lightning of the checkpoints up to the running step, and remove the oldest of too many."""
        steps = {
            f"{path}.ckpt": step
            for path in run_checkpoints(Path(str(self.dirpath)))
            if (step := step_of(path)) is not None
        }
        steps = trainer.strategy.broadcast({path: step for path, step in steps.items() if step <= trainer.global_step})
        while len(steps) > self.save_top_k:
            oldest = min(steps, key=steps.__getitem__)
            del steps[oldest]
            self._remove_checkpoint(trainer, oldest, override_async=True)
        self.best_k_models = {path: torch.tensor(step) for path, step in steps.items()}
        if steps:
            self.kth_best_model_path, self.best_model_path = (
                each(steps, key=steps.__getitem__) for each in (min, max)
            )
            self.kth_value, self.best_model_score = (
                self.best_k_models[path] for path in (self.kth_best_model_path, self.best_model_path)
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # NeMo's saves a "-last" copy here, or nothing; the last step is a checkpoint like the others.
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def _monitor_candidates(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        # NeMo logs "step" as the number of the running step; a checkpoint is named by the steps it has done.
        return {**super()._monitor_candidates(trainer), "step": torch.tensor(trainer.global_step)}

    def setup(self, trainer: Trainer, *args: object, **kwargs: object) -> None:
        # A damaged checkpoint must make room for the run's own of the same step; Lightning would save that as "-v1".
        if trainer.is_global_zero:
            for path in run_checkpoints(Path(str(self.dirpath))):
                if damage_of(path):
                    path.rename(path.with_name(f"damaged-{path.name}-{path.stat().st_mtime_ns}"))
        super().setup(trainer, *args, **kwargs)

    def save_now(self, trainer: Trainer) -> None:
        """Save the current step unless that is done, and return when everything lies on disk. On every rank."""
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        self.finish_saving(trainer)
        trainer.strategy.barrier("saved")

    def finish_saving(self, trainer: Trainer) -> None:
        """Wait until a save in the background lies on disk. On every rank."""
        if self.async_save:
            trainer.strategy.checkpoint_io.maybe_finalize_save_checkpoint(blocking=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """A save that found no room: what is complete stays, what is not is passed over at the next start.

        Raises:
            ValueError: so that nobody restarts the run into the same full disk.
        """
        if any(words in str(error) for error in _causes(exception) for words in NO_ROOM):
            step = newest_step(Path(str(self.dirpath)))
            raise ValueError(
                f"There is no room for the checkpoint of step {trainer.global_step} in {self.dirpath}: free some and "
                f"start the run again, which continues from step {step}."
            ) from exception

    def _get_finalize_save_checkpoint_callback(
        self, trainer: Trainer, filepath: str, global_step: int
    ) -> Callable[[], None]:
        finalize = super()._get_finalize_save_checkpoint_callback(trainer, filepath, global_step)

        def describe_and_finalize() -> None:
            if dist.is_initialized():
                dist.barrier()  # every rank's files are complete
            if trainer.is_global_zero:
                directory = Path(filepath).with_suffix("")
                save_resolved(self._config, directory / "config.yaml")
                record_progress(directory, global_step, trainer.datamodule.fingerprint)  # type: ignore[attr-defined]
                record_checksums(directory)
                record_sizes(directory)
            finalize()  # removes the mark of an unfinished checkpoint
            if (progress := progress_of(trainer)) is not None:
                progress.say(f"saved {checkpoint_dir(self._config) / Path(filepath).stem}")

        return describe_and_finalize


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
