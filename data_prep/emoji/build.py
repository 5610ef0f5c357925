"""The emoji dataset: scenes of named pictures in several drawing styles, as a generated set.

Beside the shards of all splits, a folder for each held-out split holds a manifest of its own, whose training split is
the set's and whose validation split is the held-out one: what reads ``train`` and ``val`` reads them so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import generated
from data_prep.emoji.concepts import FEWEST, shared_concepts, some_of
from data_prep.emoji.packages import Package
from data_prep.emoji.pictures import Gallery, load_gallery
from data_prep.emoji.questions import chosen_kinds, draw_sample
from data_prep.emoji.scene import SMALLEST_CANVAS, Scene, render
from data_prep.emoji.splits import HELD_OUT_SPLITS, Cast, casts
from data_prep.generated import GeneratedSet, composed, say
from data_prep.shards import write_whole
from nemo_pre.data.manifest import MANIFEST
from nemo_pre.whole_numbers import part_nearest

FEWEST_HELD_OUT = 6  # concepts: one more than a scene shows


@dataclass(frozen=True)
class Parameters:
    """What the bytes depend on, beside the packages."""

    num_scenes: int
    seed: int
    image_size: int
    singles: bool
    held_out_style: str | None
    held_out_concepts: float
    val_fraction: float
    num_concepts: int | None
    questions: str | None
    scenes_per_shard: int

    def __post_init__(self) -> None:
        if self.image_size < SMALLEST_CANVAS:
            raise ValueError(f"image_size={self.image_size}: give at least {SMALLEST_CANVAS} pixels")
        if not 0 <= self.held_out_concepts <= 0.5:
            raise ValueError(f"held_out_concepts={self.held_out_concepts}: give a fraction from 0 to 0.5")
        if not 0 < self.val_fraction < 0.2:
            raise ValueError(
                f"val_fraction={self.val_fraction}: give a fraction above 0 and below 0.2; four splits take it"
            )
        if self.num_concepts is not None and self.num_concepts < FEWEST:
            raise ValueError(f"num_concepts={self.num_concepts}: give at least {FEWEST}, or null for all")
        self.kinds()

    def kinds(self) -> tuple[str, ...]:
        """The types of question that are asked.

        Raises:
            ValueError: there is no such type, or single pictures cannot be asked it.
        """
        return chosen_kinds(self.questions, self.singles)

    def split_sizes(self, splits: list[str]) -> dict[str, int]:
        held = [split for split in splits if split != "train"]
        each = max(part_nearest(self.val_fraction, self.num_scenes), 1)
        if self.num_scenes <= each * len(held):
            raise ValueError(f"num_scenes={self.num_scenes}: give more than {each * len(held)}, so that some train")
        return {"train": self.num_scenes - each * len(held), **dict.fromkeys(held, each)}


@dataclass(frozen=True)
class Emoji(GeneratedSet):
    """``packages``: name, version and checksum by style; ``about``: what the manifest states of the concepts."""

    given: Parameters
    packages: dict[str, dict[str, str]]
    casts: dict[str, Cast]
    categories: list[str]
    about: dict[str, Any]

    dataset = "emoji"
    tool_version = 1
    what = "scenes of emoji"
    folders = HELD_OUT_SPLITS

    def parameters(self) -> dict[str, Any]:
        return {**asdict(self.given), "packages": self.packages}

    def split_sizes(self) -> dict[str, int]:
        return self.given.split_sizes(list(self.casts))

    def sample(
        self, rng: np.random.Generator, source: Gallery, split: str, key: str
    ) -> tuple[dict[str, bytes], list[str]]:
        given = self.given
        scene, turns = draw_sample(rng, source, self.casts[split], given.image_size, given.singles, given.kinds())
        kinds = [kind for kind, _, _ in turns]
        if scene is None:
            return composed(key, None, None, turns), kinds
        facts: dict[str, Any] = {"scene": _describe(scene, self.categories)}
        if scene.layout == "single":
            facts["concept"] = scene.pictures[0].concept.name  # a field that probes can be told of
        image, mask = render(rng, scene)
        return composed(key, image, mask, turns, **facts), kinds

    def write_last(self, out: Path, manifest: dict[str, Any]) -> None:
        for split in self._held_out():
            (out / split).mkdir(exist_ok=True)
            splits = {"train": _from_below(manifest["splits"]["train"]), "val": _from_below(manifest["splits"][split])}
            write_whole(out / split / MANIFEST, (json.dumps({**manifest, "splits": splits}, indent=1) + "\n").encode())

    def is_beside(self, out: Path) -> bool:
        return all((out / split / MANIFEST).is_file() for split in self._held_out())

    def _held_out(self) -> list[str]:
        return [split for split in HELD_OUT_SPLITS if split in self.casts]

    def facts(self, out: Path, source: Gallery) -> dict[str, Any]:
        drawn_with = ["resvg-py"] if any(about["name"] == "openmoji" for about in self.packages.values()) else []
        return {
            "image_size": self.given.image_size,
            "classes": self.categories,
            **self.about,
            "libraries": {name: version(name) for name in ("numpy", "pillow", *drawn_with)},
        }

    def split_facts(self, source: Gallery, split: str) -> dict[str, Any]:
        return {"styles": list(self.casts[split].styles), "concepts": len(self.casts[split].concepts)}


def build(out: Path, given: Parameters, packages: list[Package], workers: int | None) -> dict[str, Any]:
    """Fills ``out`` and returns the manifest.

    Raises:
        ValueError: the packages do not suit each other or ``given``, or ``out`` holds something else.
    """
    styles = [package.style for package in packages]
    if given.held_out_style is not None and (given.held_out_style not in styles or len(styles) == 1):
        raise ValueError(
            f"held_out_style={given.held_out_style}: the styles given are {', '.join(styles)}; name one of "
            "several, or null to hold none out"
        )
    concepts, left_out, names_from = shared_concepts(packages)
    shared = len(concepts)
    concepts = some_of(concepts, given.num_concepts, given.seed)
    held_out = part_nearest(given.held_out_concepts, len(concepts))
    if 0 < held_out < FEWEST_HELD_OUT:
        raise ValueError(
            f"held_out_concepts={given.held_out_concepts} of {len(concepts)} concepts are {held_out}: give a fraction "
            f"that makes at least {FEWEST_HELD_OUT}, or 0"
        )
    drawn = f"{len(concepts):,} of " if len(concepts) < shared else ""
    say(f"{drawn}{shared:,} concepts that {', '.join(styles)} share; left out: {_listed(left_out)}")
    made = Emoji(
        given,
        {p.style: {"name": p.name, "version": p.version, "sha256": p.checksum()} for p in packages},
        casts(styles, len(concepts), given.held_out_style, held_out, given.seed, pairs=not given.singles),
        sorted({concept.category for concept in concepts}),
        {"concepts": len(concepts), "left_out": left_out, "names_from": names_from},
    )
    return generated.build(out, made, lambda: load_gallery(concepts, packages), workers)


def _from_below(split: dict[str, Any]) -> dict[str, Any]:
    """A split as a manifest one folder below its shards states it."""
    files = ("file", "index")
    shards = [{k: f"../{v}" if k in files else v for k, v in entry.items()} for entry in split["shards"]]
    return {**split, "shards": shards}


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} ({reason})" for reason, number in counts.items()) or "none"


def _describe(scene: Scene, categories: list[str]) -> dict[str, Any]:
    """What is known of the scene; ``instance`` is the picture's value in the mask, ``class`` the number of its
    category among the manifest's classes, from 1, ``box`` is x0, y0, x1, y1."""
    pictures = [
        {
            "instance": instance,
            "class": 1 + categories.index(placed.concept.category),
            "concept": placed.concept.code,
            "name": placed.concept.name,
            "category": placed.concept.category,
            "subcategory": placed.concept.subcategory,
            "style": placed.style,
            "colour": placed.colour,
            "place": placed.place_name,
            "box": list(placed.box),
        }
        for instance, placed in enumerate(scene.pictures, start=1)
    ]
    return {"layout": scene.layout, "pictures": pictures}
