"""A small prepared set, the run that reads it, and its features."""

from __future__ import annotations

from pathlib import Path

from nemo_pre.cli import main
from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig
from tests.data.prepared_sets import image_bytes, sample, write_set

SHAPE = [
    "experiment=digits_tiny",
    "platform=cpu",
    "optim.freeze_vision=true",
    "model.vision.image_size=16",
    "model.vision.patch_size=8",
    "model.vision.hidden_size=12",
    "model.vision.intermediate_size=16",
    "model.vision.num_attention_heads=2",
    "model.vision.num_layers=2",
    "model.vision.feature_layer=-2",
]


def words(data: Path, features: Path | None, *more: str) -> list[str]:
    named = [] if features is None else [f"data.features={features}"]
    return [*SHAPE, f"data.path={data}", *named, *more]


def run_config(data: Path, features: Path | None, *more: str) -> RunConfig:
    return compose_run(words(data, features, *more))


def make(data: Path, features: Path, *more: str) -> int:
    """``nemo-pre data features``; its exit code."""
    return main(["data", "features", *words(data, features, *more)])


def small_set(directory: Path, count: int = 20) -> Path:
    """Samples with 0, 1, 2, 0, 1, 2, ... images, no two pictures alike; three shards and one of validation."""
    samples = [sample(f"s{n}", [image_bytes(3 * n + i) for i in range(n % 3)]) for n in range(count)]
    return write_set(directory, samples)


def run_words(output: Path, data: Path, *more: str) -> list[str]:
    """A run of six steps with PRe before the projector and LaVer, on the demo's data."""
    return [
        "experiment=digits-pre-laver",
        f"output_dir={output}",
        f"data.path={data}",
        "platform=cpu",
        "optim.freeze_vision=true",
        "optim.warmup_ratio=0",
        "model.language.num_layers=4",
        "model.vision.num_layers=2",
        "objective.pre.anchor=pre_projector",
        "objective.laver.head_hidden_width=32",
        "objective.laver.mask_schedule=constant",
        "objective.laver.mask_ratio=0.3",
        "trainer.max_steps=4",
        "trainer.checkpoint_every=2",
        "trainer.keep_checkpoints=9",
        "trainer.global_batch_size=8",
        "trainer.micro_batch_size=2",
        "trainer.log_every=1",
        "trainer.val_samples=8",
        *more,
    ]
