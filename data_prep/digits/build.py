"""The digits dataset: scenes, their questions and a tokenizer, as a generated set."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import generated
from data_prep.digits.questions import corpus, draw_sample
from data_prep.digits.scans import Scans, load_scans
from data_prep.digits.scene import CANVAS, Scene, render
from data_prep.digits.tokenizer import TOKENIZER, vocabulary_size, write_tokenizer
from data_prep.generated import GeneratedSet, composed
from nemo_pre.whole_numbers import part_nearest


@dataclass(frozen=True)
class Parameters:
    """What the bytes depend on."""

    num_scenes: int
    seed: int
    val_fraction: float
    scenes_per_shard: int

    def __post_init__(self) -> None:
        if self.num_scenes < 2:
            raise ValueError(f"num_scenes={self.num_scenes}: give at least 2, one to train on and one to validate")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give a seed of 0 or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: give a fraction between 0 and 1")
        if self.scenes_per_shard < 1:
            raise ValueError(f"scenes_per_shard={self.scenes_per_shard}: give at least 1")

    def split_sizes(self) -> dict[str, int]:
        num_val = min(max(part_nearest(self.val_fraction, self.num_scenes), 1), self.num_scenes - 1)
        return {"train": self.num_scenes - num_val, "val": num_val}


@dataclass(frozen=True)
class Digits(GeneratedSet):
    given: Parameters

    dataset = "digits"
    tool_version = 1
    what = "digit scenes"
    folders = (TOKENIZER,)

    def parameters(self) -> dict[str, Any]:
        return asdict(self.given)

    def split_sizes(self) -> dict[str, int]:
        return self.given.split_sizes()

    def sample(
        self, rng: np.random.Generator, source: Scans, split: str, key: str
    ) -> tuple[dict[str, bytes], list[str]]:
        scene, turns = draw_sample(rng, source, split)
        kinds = [kind for kind, _, _ in turns]
        if scene is None:
            return composed(key, None, None, turns), kinds
        return composed(key, *render(rng, scene), turns, scene=_describe(scene)), kinds

    def write_beside(self, out: Path, source: Scans) -> None:
        write_tokenizer(out / TOKENIZER, corpus())

    def is_beside(self, out: Path) -> bool:
        return (out / TOKENIZER / "tokenizer.json").is_file()

    def facts(self, out: Path, source: Scans) -> dict[str, Any]:
        return {
            "image_size": CANVAS,
            "tokenizer": TOKENIZER,
            "vocabulary": vocabulary_size(out / TOKENIZER),
            "source": {"name": "scikit-learn load_digits", "scans": len(source.digits), "sha256": source.checksum()},
            "libraries": {name: version(name) for name in ("numpy", "pillow", "scikit-learn", "tokenizers")},
        }

    def split_facts(self, source: Scans, split: str) -> dict[str, Any]:
        return {"scans": sum(len(numbers) for numbers in source.by_split[split])}


def build(out: Path, parameters: Parameters, workers: int | None) -> dict[str, Any]:
    return generated.build(out, Digits(parameters), lambda: load_scans(parameters.seed), workers)


def _describe(scene: Scene) -> dict[str, Any]:
    """What is known of the scene; ``instance`` is the digit's value in the mask, ``box`` is x0, y0, x1, y1."""
    digits = [
        {"instance": instance, "digit": placed.digit, "scan": placed.scan, "box": list(placed.box)}
        for instance, placed in enumerate(scene.digits, start=1)
    ]
    return {"layout": scene.layout, "digits": digits}
