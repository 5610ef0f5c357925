"""The demo's data: scenes composed of scikit-learn's handwritten digits, with questions and answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_pre.options import PathText, Seed


def prepare(
    out: PathText | Path,
    num_scenes: int = 20_000,
    seed: Seed = 0,
    workers: int | None = None,
    val_fraction: float = 0.05,
    scenes_per_shard: int = 500,
) -> dict[str, Any]:
    """Writes the digits dataset and its tokenizer into ``out`` and returns the manifest.

    The bytes written depend on every argument but ``workers`` (processes; None: one per core). Data that is
    already complete is left as it is; what is missing or cut of it is written again.

    Raises:
        ValueError: an argument is out of range, or ``out`` holds something else.
    """
    from data_prep.digits.build import Parameters, build

    return build(Path(out), Parameters(num_scenes, seed, val_fraction, scenes_per_shard), workers)
