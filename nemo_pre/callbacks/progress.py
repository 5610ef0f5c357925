"""How far a run is: one rewritten line on a terminal, plain lines in a log.

On rank 0 alone and without any collective. NeMo's own printers enter one on rank 0 only, and the next collective of
the default group then waits for ever.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import Callback

from nemo_pre.objectives.registry import term_metrics

# NeMo's names of what it logs, and the ones used here and in metrics.jsonl.
LM_LOSS = "reduced_train_loss"
READABLE = {LM_LOSS: "lm/loss"}
COUNTERS = {"step", "global_step"}  # NeMo logs them as metrics


def shown_metrics() -> dict[str, str]:
    """What stands on a progress line, and under which name."""
    of_terms = {metric.name: metric.progress for metric in term_metrics() if metric.progress is not None}
    return {"lm/loss": "loss", **of_terms, "grad_norm": "grad_norm"}


def logged_metrics(trainer: Any) -> dict[str, float]:
    """Scalars that the latest training step has logged, under readable names.

    Complete from ``on_train_batch_end`` on. Reading them waits for the device.
    """
    return {
        READABLE.get(name, name): float(value)
        for name, value in trainer.callback_metrics.items()
        if name not in COUNTERS
    }


class StepClock:
    """Mean time of a training step (seconds), without what happens between steps: validation, checkpoints."""

    def __init__(self) -> None:
        self._started: float | None = None
        self._total, self._steps = 0.0, 0

    def start(self) -> None:
        self._started = time.perf_counter()

    def stop(self) -> None:
        if self._started is not None:
            self._total += time.perf_counter() - self._started
            self._steps += 1
            self._started = None

    def take(self) -> float:
        """Mean over the steps since the last call; nan if there were none."""
        mean = self._total / self._steps if self._steps else math.nan
        self._total, self._steps = 0.0, 0
        return mean


class ProgressCallback(Callback):
    """Reports every ``log_every`` steps, and at the last: step, losses, gradient norm, speed, ETA.

    It writes to standard output; on a terminal one line is rewritten.

    Args:
        log_every: steps.
        global_batch_size: samples of a step.
    """

    def __init__(self, log_every: int, global_batch_size: int) -> None:
        self.log_every = log_every
        self.global_batch_size = global_batch_size
        self._clock = StepClock()
        self._sequence_length = 0
        self._on_line = False  # the cursor stands behind a line that the next one replaces

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.say(f"training from step {trainer.global_step} to {trainer.max_steps}")

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._clock.start()

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], **_: Any) -> None:
        self._sequence_length = batch["micro_batch"].plan.sequence_length

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._clock.stop()
        done, last = trainer.global_step, trainer.max_steps
        if not trainer.is_global_zero or (done % self.log_every and done != last):
            return
        samples_per_second = self.global_batch_size / self._clock.take()
        line = progress_line(
            done,
            last,
            logged_metrics(trainer),
            samples_per_second,
            samples_per_second * self._sequence_length,
            (last - done) * self.global_batch_size / samples_per_second,
        )
        if sys.stdout.isatty():
            self.status(line)
        else:
            self.say(line)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end_line()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end_line()  # so that the error starts on a line of its own

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._on_line:
            self._write("\r\x1b[K")
            self._on_line = False
        self._write(text + "\n")

    def status(self, text: str) -> None:
        """A passing state: on a terminal in place of the former one, nothing in a log."""
        if sys.stdout.isatty():
            self._write("\r\x1b[K" + text)
            self._on_line = True

    def _end_line(self) -> None:
        if self._on_line:
            self._write("\n")
            self._on_line = False

    def _write(self, text: str) -> None:
        try:
            sys.stdout.write(text)
            sys.stdout.flush()
        except (OSError, ValueError):
            pass  # a terminal that is gone, a log on a full disk: no reason to lose the run


def progress_of(trainer: Any) -> ProgressCallback | None:
    """The run's progress callback on rank 0, for others that have something to say; None elsewhere."""
    if not trainer.is_global_zero:
        return None
    return next((callback for callback in trainer.callbacks if isinstance(callback, ProgressCallback)), None)


def progress_line(
    step: int,
    max_steps: int,
    metrics: Mapping[str, float],
    samples_per_second: float,
    tokens_per_second: float,
    seconds_left: float,
) -> str:
    """``tokens_per_second`` counts image tokens and padding of the samples, not what an objective runs beside them."""
    shown = [f"{label} {metrics[name]:.4g}" for name, label in shown_metrics().items() if name in metrics]
    speed = [f"{samples_per_second:.3g} samples/s", f"{tokens_per_second:,.0f} tokens/s"]
    return " | ".join([f"step {step}/{max_steps}", *shown, *speed, f"ETA {duration(seconds_left)}"])


def duration(seconds: float) -> str:
    """``3h05m``, ``4m07s`` or ``12s``."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
