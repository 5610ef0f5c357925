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


def untrained_run(model: ModelConfig, output_dir: str) -> RunConfig:
    """A run that builds a model and does nothing with it, on one rank."""
    return RunConfig(
        name=model.name,
        output_dir=output_dir,
        resume=False,
        model=model,
        data=DataConfig(name="none", path="none", sequence_length=model.language.max_position_embeddings or 2048),
        parallel=ParallelConfig(distributed_optimizer=False),
        precision=PrecisionConfig(name="fp32"),
        optim=OptimConfig(lr=1e-3),  # there is none
        trainer=TrainerConfig(max_steps=1, global_batch_size=1, micro_batch_size=1),
    )
