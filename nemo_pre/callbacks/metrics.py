"""A run's metrics as ``metrics.jsonl``, one object per line, as TensorBoard events, and to Weights & Biases if asked.

None stops a run: a full disk gives one warning and a gap in the record, and W&B sends from a process of its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from nemo_pre.callbacks.progress import READABLE, StepClock, logged_metrics
from nemo_pre.config.run import RunConfig
from nemo_pre.run_files.metrics import METRICS, MetricsFile, Tolerant

log = logging.getLogger(__name__)


class MetricsCallback(Callback):
    """Appends to ``output_dir/metrics.jsonl``, on rank 0, every ``every`` steps and at the last.

    A line has ``step`` (optimizer steps done), ``time`` (seconds since 1970), ``step_time`` (seconds, mean since the
    last line), ``samples_per_second`` and every logged scalar; a value that is not finite becomes null. What
    :func:`record_metrics` is given comes on lines of its own, without the speed. After a resume the lines behind the
    checkpoint are cut off.
    """

    def __init__(self, output_dir: str | Path, every: int, global_batch_size: int) -> None:
        self.file = MetricsFile(Path(output_dir) / METRICS)
        self.every = every
        self.global_batch_size = global_batch_size
        self._clock = StepClock()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        # Not in on_fit_start: Lightning restores the step after it.
        if trainer.is_global_zero:
            self.file.cut_behind(trainer.global_step)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._clock.start()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._clock.stop()
        step = trainer.global_step
        if trainer.is_global_zero:
            self.file.cut()  # the first step is done, and the former one of its number is no longer the run's
        if not trainer.is_global_zero or (step % self.every and step != trainer.max_steps):
            return
        step_time = self._clock.take()
        speed = {"step_time": step_time, "samples_per_second": self.global_batch_size / step_time}
        self.file.append(step, logged_metrics(trainer) | speed)


def record_metrics(trainer: Any, metrics: Mapping[str, float]) -> None:
    """Put results that belong to the current step, and not to every step, on record: file and loggers.

    ``LightningModule.log`` would repeat them at every later step. Call it on every rank.
    """
    step = trainer.global_step
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)
    if trainer.is_global_zero:
        for callback in trainer.callbacks:
            if isinstance(callback, MetricsCallback):
                callback.file.append(step, metrics)


def withdraw(trainer: Any, names: Iterable[str]) -> None:
    """Take back metrics that the running step has nothing of: neither a zero nor the last step's value, which
    Lightning would repeat, goes on record. Whoever reads a step's metrics is a callback that comes later."""
    absent = set(names)
    if not absent:
        return
    for logged in trainer._results.values():
        if logged.meta.name in absent:
            logged.reset()  # until it is logged again
    for known in (trainer.callback_metrics, trainer.logged_metrics, trainer.progress_bar_metrics):
        for name in absent:
            known.pop(name, None)


class RunTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger with readable names, which warns once instead of raising when it cannot write."""

    def __init__(self, output_dir: str | Path) -> None:
        super().__init__(save_dir=str(output_dir), name="tensorboard", version="", default_hp_metric=False)
        self._warned = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with Tolerant(self._failed):
            super().log_metrics({READABLE.get(name, name): value for name, value in metrics.items()}, step)

    def save(self) -> None:
        with Tolerant(self._failed):
            super().save()

    def finalize(self, status: str) -> None:
        with Tolerant(self._failed):
            super().finalize(status)

    def _failed(self, error: OSError) -> None:
        if not self._warned:
            log.warning("TensorBoard events are not recorded: %s. Training goes on.", error)
            self._warned = True


class RunWandb(WandbLogger):
    """Lightning's W&B logger with readable names; a resumed run goes on in the record it began.

    Raises, when the run starts: ``wandb.errors.UsageError``, without a login and outside of offline mode.
    """

    def __init__(self, config: RunConfig) -> None:
        directory = Path(config.output_dir).resolve()
        super().__init__(
            name=config.name,
            project=config.trainer.wandb_project,
            id=hashlib.sha256(str(directory).encode()).hexdigest()[:16],
            save_dir=str(directory),
            resume="allow",
            config=dataclasses.asdict(config),
        )

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics({READABLE.get(name, name): value for name, value in metrics.items()}, step)
