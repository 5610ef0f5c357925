"""Which samples each step trained on, as ``samples.jsonl``: to find what a bad step saw, and to compare two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.callbacks.step_planning import step_planning
from nemo_pre.run_files.metrics import MetricsFile

SAMPLES = "samples.jsonl"


class SampleRecord(Callback):
    """A line per step: ``step`` and ``samples``, their keys, rank by data-parallel rank.

    After a resume the lines behind the checkpoint are cut off. It costs an exchange of the keys at every step.
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.file = MetricsFile(Path(output_dir) / SAMPLES)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.is_global_zero:
            self.file.cut_behind(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        from nemo_pre.parallel.micro_batch import raw_batch

        batches = [raw_batch(item) for item in step_planning(trainer).items]
        keys = [key for batch in batches for key in batch["keys"]]
        everyone = gather_over_data_parallel(keys)
        if trainer.is_global_zero:
            self.file.append(trainer.global_step, {"samples": [key for of_rank in everyone for key in of_rank]})


def gather_over_data_parallel(keys: list[str]) -> list[list[str]]:
    from megatron.core import parallel_state as ps

    size = ps.get_data_parallel_world_size()
    if size == 1:
        return [keys]
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, keys, group=ps.get_data_parallel_group_gloo())
    return gathered
