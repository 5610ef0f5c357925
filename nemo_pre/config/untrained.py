"""The configuration of a run that trains nothing, of which a model is built all the same."""

from __future__ import annotations

from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
)

NO_DATA = "none"  # the dataset's name and its path, where a configuration has none: an empty path would be refused


def no_data(sequence_length: int) -> DataConfig:
    """The data options of a run or an import that reads no dataset."""
    return DataConfig(name=NO_DATA, path=NO_DATA, sequence_length=sequence_length)


def untrained_run(model: ModelConfig, output_dir: str) -> RunConfig:
    """A run that builds a model and does nothing with it, on one rank."""
    return RunConfig(
        name=model.name,
        output_dir=output_dir,
        resume=False,
        model=model,
        data=no_data(model.language.max_position_embeddings or 2048),
        parallel=ParallelConfig(distributed_optimizer=False),
        precision=PrecisionConfig(name="fp32"),
        optim=OptimConfig(lr=1e-3),  # there is none
        trainer=TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
    )
