"""Prepared scenes as tensors that a tower is taught from: pixels, and the labels of their patches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from nemo_pre.data.decoding import decode_labels, decoded, of_sample
from nemo_pre.data.images import image_tensor
from nemo_pre.data.manifest import Manifest, verify_shards
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.diagnostics.samples import MASK
from nemo_pre.teaching.labels import SceneObject, patch_labels, scene_objects

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

TRAIN = "train"


@dataclass(frozen=True)
class Scenes:
    """``pixels`` uint8 [N, 3, H, W] as the tower sees them before they are normalised, ``classes`` int64 [N, P] and
    ``boxes`` float32 [N, P, 4], as :func:`nemo_pre.teaching.labels.patch_labels` gives them."""

    pixels: Tensor
    classes: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.pixels)


def names_of(manifest: Manifest, field: str | None) -> dict[str, int]:
    """The class of each name that an object of the train split has, from 1 on, in order.

    Raises:
        ValueError: the train split shows no object.
    """
    found = {each.name for _, objects in _records(manifest, TRAIN, field) for each in objects}
    if not found:
        raise ValueError(f"{manifest.directory} shows no objects in a train split: prepare scenes of them.")
    return {name: number for number, name in enumerate(sorted(found), start=1)}


def read_scenes(
    run: RunConfig, manifest: Manifest, split: str, numbers: Mapping[str, int], field: str | None
) -> Scenes:
    """Every sample of the split that has a scene.

    Raises:
        ValueError: a shard is not whole, or the split has no scene.
    """
    vision, data = run.model.vision, run.data
    side = vision.image_size // vision.patch_size
    samples = ShardedSamples(manifest.shards[split])
    pixels, classes, boxes = [], [], []
    for position, objects in _records(manifest, split, field):
        raw = samples.read(position)
        picture = decoded(raw.images[0], raw.where)
        with of_sample(raw.where):
            mask = decode_labels(samples.read_member(position, MASK))
        # The mask as the picture is resized, but without interpolation (0: nearest).
        small = torch.from_numpy(np.array(mask.resize((vision.image_size,) * 2, 0))).long()
        labels = patch_labels(small, objects, numbers, picture.size, side)
        seen = image_tensor(picture, vision.image_size, [0.0] * 3, [1.0] * 3, raw.where, "whole", data.image_filter)
        pixels.append(seen.mul(255).round().byte())
        classes.append(labels[0])
        boxes.append(labels[1])
    if not pixels:
        raise ValueError(f"The {split} split of {manifest.directory} has no scene: prepare more samples.")
    return Scenes(torch.stack(pixels), torch.stack(classes), torch.stack(boxes))


def _records(manifest: Manifest, split: str, field: str | None) -> Iterator[tuple[int, list[SceneObject]]]:
    """The positions of the samples that are scenes, and their objects."""
    shards = manifest.shards.get(split)
    if not shards:
        raise ValueError(f"{manifest.directory} has no {split} shards: prepare the data again.")
    verify_shards(shards)
    samples = ShardedSamples(shards)
    for position in range(len(samples)):
        sample = samples.read(position, images=False)
        if "scene" in sample.record:
            yield position, scene_objects(sample.record["scene"], sample.where, field)


def other_splits(manifest: Manifest) -> Iterable[str]:
    """The splits that a tower is measured on."""
    return sorted(split for split, shards in manifest.shards.items() if split != TRAIN and shards)
