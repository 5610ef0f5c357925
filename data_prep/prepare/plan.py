"""Which samples go into which chunk: drawn, shuffled and split by seed, before any is read.

A chunk is the work of one process at a time: up to ``shard_samples`` samples in a row, which become one shard, or
several where they take more than ``shard_mb``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.prepare.blend import Source

SPLITS = ("train", "val")
ENCODINGS = ("jpeg", "png", "webp")


@dataclass(frozen=True)
class Options:
    """What the bytes depend on, beside the sources."""

    subset: int | None = None
    val_samples: int = 1000
    seed: int = 0
    shuffle: bool = True
    shard_samples: int = 10_000
    shard_mb: int = 1000
    verify_images: bool = False
    max_pixels: int | None = None
    reencode: str | None = None
    repair: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, least in (("subset", 1), ("val_samples", 0), ("seed", 0), ("shard_samples", 1), ("shard_mb", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value}: give {least} or more")
        if self.max_pixels is not None and self.max_pixels < 1:
            raise ValueError(f"max_pixels={self.max_pixels}: give 1 or more, or null to keep all images as they are")
        if self.reencode is not None and self.reencode not in ENCODINGS:
            raise ValueError(f"reencode={self.reencode} is not one of {', '.join(ENCODINGS)}")


@dataclass(frozen=True)
class Chunk:
    """Samples ``start`` to ``stop`` of a split's order."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def draw_order(sources: Sequence[Source], sizes: Sequence[int], options: Options) -> dict[str, np.ndarray]:
    """The samples of each split in their order, as row numbers of all sources one after the other (int64).

    A sample that a weight repeats is only ever in one split.

    Raises:
        ValueError: fewer samples than ``subset``, or none left to train on.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    taken = np.concatenate(
        [
            starts[number] + _draw(size, source.num_taken(size), np.random.default_rng([options.seed, 1, number]))
            for number, (source, size) in enumerate(zip(sources, sizes, strict=True))
        ]
    )
    if options.subset is not None and options.subset > len(taken):
        raise ValueError(f"subset={options.subset}, but there are only {len(taken)} samples: give fewer")
    places = np.random.default_rng([options.seed, 0]).permutation(len(taken))[: options.subset]
    shuffled = taken[places]
    validation = _first_of_each(shuffled)[: options.val_samples]
    order = shuffled if options.shuffle else taken[np.sort(places)]
    held_out = np.isin(order, validation)
    if held_out.all():
        raise ValueError(
            f"val_samples={options.val_samples} leaves nothing to train on of {len(_first_of_each(order))} samples: "
            f"set val_samples lower"
        )
    return {"train": order[~held_out], "val": _first_of_each(order[held_out])}


def chunks_of(order: dict[str, np.ndarray], options: Options) -> list[Chunk]:
    size = options.shard_samples
    return [
        Chunk(split, number, start, min(start + size, len(order[split])))
        for split in SPLITS
        for number, start in enumerate(range(0, len(order[split]), size))
    ]


def chunk_of(file: str) -> str:
    """The name of the chunk that a shard belongs to: train-00000 for train-00000.tar and train-00000-1.tar."""
    return "-".join(file.removesuffix(".tar").split("-")[:2])


def _draw(rows: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """``count`` of ``rows``, in their order: every row as often as fits, and a random choice of them once more."""
    if not rows:
        return np.empty(0, np.int64)
    rest = np.sort(rng.permutation(rows)[: count % rows])
    return np.concatenate([np.tile(np.arange(rows, dtype=np.int64), count // rows), rest])


def _first_of_each(samples: np.ndarray) -> np.ndarray:
    _, first = np.unique(samples, return_index=True)
    return samples[np.sort(first)]
