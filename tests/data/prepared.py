"""What the tests of the data prepare, and the configuration that reads it."""

from __future__ import annotations

from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import DataConfig

PREPARE = {"num_scenes": 400, "seed": 3, "val_fraction": 0.2, "scenes_per_shard": 64}


def digits_config(path: Path, **data: object) -> RunConfig:
    config = RunConfig(name="test")
    config.data = DataConfig(name="digits", path=str(path), sequence_length=88, **data)  # type: ignore[arg-type]
    config.model.vision.image_size, config.model.vision.patch_size = 48, 6
    config.model.language.vocab_size = 128
    config.trainer.global_batch_size, config.trainer.micro_batch_size = 16, 2
    return config
