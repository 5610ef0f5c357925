"""A job that is asked to stop does so after the running step, with a checkpoint; one that cannot go on says why."""

from __future__ import annotations

import faulthandler
import os
import signal
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.checkpoint import RunCheckpoint
from nemo_pre.launch import stopping
from nemo_pre.parallel.finite import NotFiniteError

STDERR = 2  # the file descriptor, whatever sys.stderr is by then
DUMP_TIME = 10  # seconds every rank has for printing its stacks before the first one ends


class PreemptionCallback(Callback):
    """Stops the run at a step boundary when any rank was told to: every rank writes the checkpoint, then exits with
    ``stopping.REQUEUE``. Costs an all-reduce of one number per step, on a CPU group of its own.

    It must come after the callbacks whose record of the step is to be complete.

    Raises:
        SystemExit: the run stopped and can go on.
    """

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if "SLURM_JOB_ID" in os.environ:
            stopping.listen()  # again: Lightning's handler of SIGTERM ends one rank without asking the others
        # gloo, so that no GPU is waited for; its own, so that it can mix with nothing
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not self._agreed(stopping.is_requested(trainer.is_global_zero)) or trainer.global_step >= trainer.max_steps:
            return
        checkpoint = next(each for each in trainer.callbacks if isinstance(each, RunCheckpoint))
        checkpoint.save_now(trainer)
        if trainer.is_global_zero:
            print(f"stopped after step {trainer.global_step}, with a checkpoint", flush=True)
        raise SystemExit(stopping.REQUEUE)

    def _agreed(self, requested: bool) -> bool:
        if self._group is None:
            return requested
        requests = torch.tensor([int(requested)])
        dist.all_reduce(requests, op=dist.ReduceOp.MAX, group=self._group)
        return bool(requests.item())


class HangWatchdog(Callback):
    """Ends a rank that finishes no step for ``timeout`` seconds, after it has printed the stacks of all its threads. A
    step is counted with its validation and checkpoint, and building and restoring the model as one.

    Steps are collective, so every rank's time is up at once, and the ranks that wait show whom they wait for. Both the
    printing and the end work while a library holds the interpreter's lock.
    """

    def __init__(self, timeout: int) -> None:
        self.timeout = timeout

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._wind_up()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._wind_up()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self._wind_up()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._stop()

    def _wind_up(self) -> None:
        faulthandler.dump_traceback_later(self.timeout, file=STDERR)
        signal.setitimer(signal.ITIMER_REAL, self.timeout + DUMP_TIME)

    def _stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)


class NotANumberGuard(Callback):
    """Turns the optimizer's error about gradients that are not finite into one for the user: a restart would meet the
    same numbers again.

    Raises:
        ValueError: there is a NaN or Inf in a gradient.
    """

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        if isinstance(exception, NotFiniteError):
            raise ValueError(
                f"The gradients of step {trainer.global_step + 1} are not finite: lower optim.lr, raise the warm-up, "
                f"or continue from an earlier checkpoint with another seed."
            ) from exception
