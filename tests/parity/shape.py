"""The tiny model of the parity tests, as a run's configuration: the shapes of :mod:`tests.reference.tiny`."""

from __future__ import annotations

from typing import Any

from nemo_pre.config.run import ObjectiveConfig, RunConfig
from nemo_pre.config.schema import (
    DataConfig,
    LanguageConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
    VisionConfig,
)
from nemo_pre.objectives.laver import LaVerConfig
from nemo_pre.objectives.pre import PReConfig
from nemo_pre.objectives.viral import ViralConfig


def tiny_run(
    output_dir: str,
    parallel: dict[str, Any],
    pre: dict[str, Any] | None,
    num_microbatches: int,
    micro_batch_size: int,
    max_steps: int,
    precision: str = "fp32",
    language: dict[str, Any] | None = None,
    laver: dict[str, Any] | None = None,
    viral: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
) -> RunConfig:
    """A run of ``max_steps`` steps; ``pre``, ``laver`` and ``viral`` hold their configs' fields; None switches the
    term off."""
    from tests.reference import tiny

    clip = tiny.VISION
    data = parallel.get("data", 1)
    return RunConfig(
        name="parity",
        platform="cpu",
        output_dir=output_dir,
        resume=False,
        model=ModelConfig(
            name="tiny",
            vision=VisionConfig(
                **{
                    "family": "clip",
                    "image_size": clip["image_size"],
                    "patch_size": clip["patch_size"],
                    "hidden_size": clip["hidden_size"],
                    "intermediate_size": clip["intermediate_size"],
                    "num_layers": clip["num_hidden_layers"],
                    "num_attention_heads": clip["num_attention_heads"],
                    **(vision or {}),
                }
            ),
            language=LanguageConfig(
                **{
                    "num_layers": tiny.LAYERS,
                    "hidden_size": tiny.WIDTH,
                    "ffn_hidden_size": tiny.FFN,
                    "num_attention_heads": tiny.HEADS,
                    "num_query_groups": tiny.GROUPS,
                    "vocab_size": tiny.VOCABULARY,
                    **(language or {}),
                }
            ),
            **(model or {}),
        ),
        data=DataConfig(name="parity", path="unused", sequence_length=tiny.MAX_LENGTH),
        parallel=ParallelConfig(**{"distributed_optimizer": False, **parallel}),
        precision=PrecisionConfig(name=precision),
        optim=OptimConfig(lr=1e-3, warmup_ratio=0.0),
        objective=ObjectiveConfig(
            name="pre",
            pre=PReConfig(enabled=pre is not None, **(pre or {})),
            laver=LaVerConfig(enabled=laver is not None, **(laver or {})),
            viral=ViralConfig(enabled=viral is not None, **(viral or {})),
        ),
        trainer=TrainerConfig(
            max_steps=max_steps,
            global_batch_size=num_microbatches * micro_batch_size * data,
            micro_batch_size=micro_batch_size,
        ),
    )
