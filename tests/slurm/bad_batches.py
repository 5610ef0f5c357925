"""The rank's side of test_roll_back: a run in which certain batches of the data do harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from nemo_pre.config.run import RunConfig

# In the run's directory, a line each: the numbers of global batches of the whole stream, and the factor by which such
# a batch multiplies the weights of the last rank before its step.
BAD_BATCHES = "bad_batches"


def run_rank(config: RunConfig) -> None:
    from nemo_pre import train

    own = train.run_callbacks
    train.run_callbacks = lambda config: [BadBatches(Path(config.output_dir)), *own(config)]
    train.run_rank(config)


class BadBatches(Callback):
    def __init__(self, run: Path) -> None:
        numbers, factor = (run / BAD_BATCHES).read_text().splitlines()
        self.numbers, self.factor = numbers.split(","), float(factor)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        from nemo_pre.data.sampler import whole_position

        sampler = trainer.datamodule.data_sampler
        position = whole_position(trainer.datamodule.consumed_samples, sampler.skipped)
        is_bad = str(position // sampler.global_batch_size) in self.numbers
        if is_bad and trainer.global_rank == trainer.world_size - 1:
            with torch.no_grad():
                for parameter in trainer.model.parameters():
                    parameter.mul_(self.factor)
