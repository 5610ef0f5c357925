"""A loss that leaves its path stops the run, or rolls it back to the last checkpoint, without what followed that."""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.checkpoint import RunCheckpoint
from nemo_pre.callbacks.progress import LM_LOSS
from nemo_pre.config.run import RunConfig
from nemo_pre.launch import stopping
from nemo_pre.run_files.checkpoints import checkpoint_dir, newest_step
from nemo_pre.run_files.skipped_samples import read_skipped, record_skipped

ROLL_BACK = "roll_back"


class LossGuard(Callback):
    """Looks at every step's loss and gradient norm before the step can become a checkpoint.

    Rank 0 judges and all ranks hear of it: one small broadcast a step, on a CPU group of its own. A roll-back ends
    every rank with ``stopping.ROLL_BACK``. Who started them starts them again, and they go on from the newest
    checkpoint without the samples trained on since, which are on record (:mod:`nemo_pre.run_files.skipped_samples`).

    Raises:
        ValueError: the run is to stop.
        SystemExit: the run is to be started again.
    """

    def __init__(self, config: RunConfig) -> None:
        self.options, self.output_dir, self.checkpoints = config.trainer, config.output_dir, checkpoint_dir(config)
        self._losses: deque[float] = deque(maxlen=self.options.spike_window)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses.extend(state_dict["losses"])

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        action, reason = self._agreed(self._judge(trainer) if trainer.is_global_zero else None)
        if action == "stop":
            raise ValueError(reason)
        if action == ROLL_BACK:
            self._roll_back(trainer, reason)

    def _judge(self, trainer: Any) -> tuple[str, str]:
        """What to do, and why. Reading the loss waits for the device; a batch without a loss token has none."""
        logged = trainer.callback_metrics
        loss = float(logged[LM_LOSS]) if LM_LOSS in logged else None
        judged = {"loss": loss, "gradient norm": float(logged.get("grad_norm", 0.0))}
        found = {name: value for name, value in judged.items() if value is not None}
        action, reason = "none", ""
        if not all(map(math.isfinite, found.values())):
            action = self.options.nan_action
            reason = "has " + " and ".join(f"the {name} {value:g}" for name, value in found.items())
        elif loss is not None and self.options.spike_action != "none" and self._is_spike(loss):
            action = self.options.spike_action
            reason = f"has the loss {loss:.4g} where {median(self._losses):.4g} is usual"
        elif loss is not None:
            self._losses.append(loss)
        if action == ROLL_BACK and len(read_skipped(self.output_dir)) >= self.options.max_roll_backs:
            action, reason = "stop", f"{reason}, and trainer.max_roll_backs={self.options.max_roll_backs} are done"
        cure = ": lower optim.lr, raise the warm-up, or look at the data." if action == "stop" else ""
        return action, f"Step {trainer.global_step} {reason}{cure}"

    def _is_spike(self, loss: float) -> bool:
        enough = len(self._losses) * 5 >= self.options.spike_window
        return enough and loss > self.options.spike_factor * median(self._losses)

    def _agreed(self, judgement: tuple[str, str] | None) -> tuple[str, str]:
        """Rank 0's judgement, on every rank."""
        message = [judgement]
        if self._group is not None:
            dist.broadcast_object_list(message, src=0, group=self._group)
        assert message[0] is not None
        return message[0]

    def _roll_back(self, trainer: Any, reason: str) -> None:
        next(each for each in trainer.callbacks if isinstance(each, RunCheckpoint)).finish_saving(trainer)
        if trainer.is_global_zero:
            start = newest_step(self.checkpoints)
            record_skipped(self.output_dir, trainer.datamodule.trained_between(start, trainer.global_step, reason))
            print(f"{reason}: back to step {start}, without the batches since", flush=True)
        trainer.strategy.barrier("rolled back")
        raise SystemExit(stopping.ROLL_BACK)
