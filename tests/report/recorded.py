"""Run directories as ``nemo-pre train`` leaves them, without training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from omegaconf import OmegaConf

from nemo_pre.run_files.metrics import METRICS, MetricsFile

Records = Mapping[int, Mapping[str, float]]


def record_run(directory: Path, records: Records, seed: int | None = 1, **options: object) -> Path:
    """Metrics by step, and a config with ``seed`` for both seeds (none if ``seed`` is None).

    An option's dots are written as two underscores: ``objective__pre__weight``.
    """
    file = MetricsFile(directory / METRICS)
    for step, metrics in records.items():
        file.append(step, metrics)
    if seed is not None:
        config = OmegaConf.create({"name": directory.name, "seed": seed, "output_dir": str(directory)})
        OmegaConf.update(config, "data.shuffle_seed", seed)
        for name, value in options.items():
            OmegaConf.update(config, name.replace("__", "."), value)
        OmegaConf.save(config, directory / "config.yaml")
    return directory


def final(**values: float) -> Records:
    """One record at step 10; ``a__b`` is the metric ``a/b``."""
    return {10: {name.replace("__", "/"): value for name, value in values.items()}}
