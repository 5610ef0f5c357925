"""Pictures with what is known of them: masks for the patches, and what a probe should find.

Only samples with exactly one image take part, each with its first question. Probes are fitted on the train split and
tested on the val split. Their tasks:

- ``presence``: which classes the mask holds, of those that 5% to 95% of the fit images hold, at most 20, the most
  frequent first; the mean over the classes of right decisions;
- ``count``: how many objects a composed scene shows, digits or emoji;
- ``label``: the class in a field of the records, as in data made for image classification.

Of the pictures of a composed scene (emoji) each can be asked for by itself, too: see :mod:`.objects`.

Masks: in a composed scene the grey value is an object's number. A digit's class is its value, whichever scan it is of,
and an emoji's its category; the rest is background. In other data (COCO-Stuff) the grey value is the class, 255 is
unlabelled, and there is no background.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_pre.data.conversation import IMAGE_TAG
from nemo_pre.data.decoding import decode_labels, decoded, of_sample
from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import read_manifest, verify_shards
from nemo_pre.data.shards import RawSample, ShardedSamples
from nemo_pre.diagnostics.objects import ObjectClasses, SceneObject
from nemo_pre.diagnostics.probe import ProbeTask

if TYPE_CHECKING:
    from PIL.Image import Image

MASK = "mask.png"
UNLABELLED = 255  # the grey value of a pixel without a class
LARGEST_COUNT = 9
RARE, COMMON, MOST_CLASSES = 0.05, 0.95, 20


@dataclass(frozen=True)
class DiagnosticSample:
    """``mask``: grey picture of class numbers, 255 where unlabelled, or None; ``truth`` ``[C]``: the tasks' indicators
    side by side; ``question``: with the image's tag; ``instances``: grey picture of ``objects``' numbers."""

    key: str
    picture: Image
    question: str
    mask: Image | None
    truth: Tensor
    instances: Image | None = None
    objects: tuple[SceneObject, ...] = ()

    @property
    def marked_mask(self) -> Image | None:
        """The mask, 255, which shows what a processor pads, and the numbers of a scene's objects, as channels."""
        from PIL import Image

        if self.mask is None:
            return None
        inside = Image.new("L", self.mask.size, 255)
        return Image.merge("RGB", (self.mask, inside, self.instances or Image.new("L", self.mask.size)))


@dataclass(frozen=True)
class DiagnosticData:
    """Reads samples when asked; iterating twice reads twice.

    Attributes:
        fit, test: positions in the train and the val split.
        tasks: of the probes; empty where the data know nothing to probe for.
        background: the class of patches without an object, None where there is none.
        class_names: of the masks' classes.
    """

    train: ShardedSamples | None
    val: ShardedSamples
    fit: list[int]
    test: list[int]
    tasks: list[ProbeTask]
    background: int | None
    class_names: dict[int, str]
    presence: list[int]
    labels: dict[str, int]
    label: str | None
    has_masks: bool
    objects: ObjectClasses | None = None

    def fit_samples(self) -> Iterator[DiagnosticSample]:
        assert self.train is not None or not self.fit
        return (self._sample(self.train, position) for position in self.fit if self.train is not None)

    def test_samples(self) -> Iterator[DiagnosticSample]:
        return (self._sample(self.val, position) for position in self.test)

    def _sample(self, samples: ShardedSamples, position: int) -> DiagnosticSample:
        raw = samples.read(position)
        mask = _mask(samples, position, raw) if self.has_masks else None
        parts = []
        for task in self.tasks:
            if task.name == "presence":
                held = _classes(mask)
                parts.append(torch.tensor([float(number in held) for number in self.presence]))
            elif task.name == "count":
                parts.append(_one_of(min(len(_classes_by_instance(raw)), LARGEST_COUNT), task.size))
            else:
                # A class that the fit set lacks has no indicator, and no answer to it is right.
                parts.append(_one_of(self.labels.get(str(raw.record.get(str(self.label))), task.size - 1), task.size))
        truth = torch.cat(parts) if parts else torch.zeros(0)
        instances: Image | None = None
        objects: tuple[SceneObject, ...] = ()
        if self.objects is not None:
            with of_sample(raw.where):
                instances = decode_labels(samples.read_member(position, MASK))
            objects = self.objects.of_scene(raw.record["scene"]["pictures"])
        picture = decoded(raw.images[0], raw.where)
        return DiagnosticSample(raw.key, picture, _question(raw), mask, truth, instances, objects)


def read_data(
    data: str | Path, num_fit: int, num_test: int, label: str | None = None, objects: bool = False
) -> DiagnosticData:
    """The first ``num_fit`` pictures of the train split and ``num_test`` of the val split of a prepared directory.

    Args:
        label: field of the records whose class is probed for.
        objects: the pictures of each scene are asked for, too.

    Raises:
        ValueError: the data cannot be read, or no val sample has exactly one image, or no fit sample has the label, or
            scenes have no named pictures.
    """
    manifest = read_manifest(data, "data")
    splits: dict[str, ShardedSamples | None] = {"train": None, "val": None}
    for split in splits:
        if shards := manifest.shards.get(split):
            verify_shards(shards)
            splits[split] = ShardedSamples(shards)
    train, val = splits["train"], splits["val"]
    if val is None:
        raise ValueError(f"{manifest.directory} has no val shards: prepare the data again.")
    test = _with_one_image(val, num_test)
    if not test:
        raise ValueError(f"{manifest.directory} has no val sample with exactly one image: name other data.")
    fit = _with_one_image(train, num_fit) if train is not None else []
    first = val.read(test[0])
    has_masks = _has_mask(val, test[0])
    is_composed = "scene" in first.record
    presence = _frequent_classes(train, fit) if has_masks and train is not None else []
    tasks = [ProbeTask("presence", len(presence), several=True)] if presence else []
    if is_composed and fit:
        tasks.append(ProbeTask("count", LARGEST_COUNT + 1))
    labels: dict[str, int] = {}
    if label is not None:
        values = {str(train.read(n).record[label]) for n in fit if label in train.read(n).record} if train else set()
        if not values:
            raise ValueError(
                f"label={label} is in no record of {manifest.directory}: name a field that holds a class."
            )
        labels = {value: number for number, value in enumerate(sorted(values))}
        tasks.append(ProbeTask("label", len(labels) + 1))  # and one for what the fit set lacks
    classes = manifest.raw.get("classes") or [f"digit {digit}" for digit in range(10)]
    names = dict(enumerate(["background", *classes])) if is_composed else {}
    named = None
    if objects:
        if train is None or not fit or "pictures" not in first.record.get("scene", {}):
            raise ValueError(
                f"objects=true needs scenes of named pictures to fit on and {manifest.directory} has none: give data "
                f"that nemo-pre data emoji wrote, and num_fit."
            )
        named = ObjectClasses.of_scenes(train.read(number, images=False).record["scene"]["pictures"] for number in fit)
    return DiagnosticData(
        train, val, fit, test, tasks, 0 if is_composed else None, names, presence, labels, label, has_masks, named
    )


def _with_one_image(samples: ShardedSamples, count: int) -> list[int]:
    found: list[int] = []
    for position in range(len(samples)):
        if len(found) >= count:
            break
        if len(samples.read(position).images) == 1:
            found.append(position)
    return found


def _has_mask(samples: ShardedSamples, position: int) -> bool:
    try:
        samples.read_member(position, MASK)
    except SampleError:
        return False
    return True


def _mask(samples: ShardedSamples, position: int, raw: RawSample) -> Image:
    import numpy as np
    from PIL import Image

    with of_sample(raw.where):
        values = np.array(decode_labels(samples.read_member(position, MASK)))
    if "scene" in raw.record:
        of_instance = np.zeros(256, np.uint8)
        for instance, number in _classes_by_instance(raw).items():
            of_instance[instance] = number
        values = of_instance[values]
    return Image.fromarray(values)


def _classes_by_instance(raw: RawSample) -> dict[int, int]:
    """The class of each object of a composed scene, by its value in the mask."""
    scene = raw.record["scene"]
    if "digits" in scene:
        return {placed["instance"]: placed["digit"] + 1 for placed in scene["digits"]}
    return {placed["instance"]: placed["class"] for placed in scene["pictures"]}


def _classes(mask: Image | None) -> set[int]:
    return {number for number, count in enumerate(mask.histogram()) if count} - {UNLABELLED} if mask else set()


def _frequent_classes(samples: ShardedSamples, positions: Sequence[int]) -> list[int]:
    images: Counter[int] = Counter()
    for position in positions:
        images.update(_classes(_mask(samples, position, samples.read(position))))
    worth_asking = [
        number for number, count in images.most_common() if RARE * len(positions) <= count <= COMMON * len(positions)
    ]
    return sorted(worth_asking[:MOST_CLASSES])


def _one_of(number: int, size: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(number), size).float()


def _question(raw: RawSample) -> str:
    try:
        question: Any = raw.record["conversations"][0]["value"]
    except (LookupError, TypeError) as error:
        raise SampleError(f"{raw.where} has no question: prepare the data again") from error
    return question if IMAGE_TAG in question else f"{IMAGE_TAG}\n{question}"
