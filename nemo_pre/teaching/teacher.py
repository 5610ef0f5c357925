"""Teaching a vision tower to name what each patch shows and to say where that lies, and measuring it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_pre.diagnostics.patches import NOTHING
from nemo_pre.neva.vision import VisionTowerConfig, encoder_features
from nemo_pre.parallel.seeding import seeded
from nemo_pre.teaching.labels import NO_OBJECT
from nemo_pre.teaching.training import train

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig
    from nemo_pre.teaching.scenes import Scenes

BOX_WEIGHT, BOX_BETA = 2.0, 0.05  # of the boxes' loss beside that of names; where it turns from squares to distances
DROPOUT = 0.1  # of the features that names and boxes are read from: no name hangs on a single number
AT_A_TIME = 256  # scenes, where nothing is learned


@dataclass(frozen=True)
class Accuracy:
    """How well patches are read.

    Attributes:
        objects: share of the patches with an object that get its name.
        empty: share of the patches without one that are said to be so.
        box: mean distance of a box's four sides from where they are, in fractions of the picture.
        patches: those with an object.
    """

    objects: float
    empty: float
    box: float
    patches: int


class Teacher(nn.Module):
    """A tower with two linear heads on its patches' features, which are thrown away when it is taught.

    Args:
        run: its ``model.vision`` and ``seed`` give the tower and its random weights.
        num_names: names that objects have.
    """

    def __init__(self, run: RunConfig, num_names: int) -> None:
        super().__init__()
        vision = run.model.vision
        self.tower = VisionTowerConfig(vision, run.seed).configure_model()
        self._layer, self._patches = vision.feature_layer, (vision.image_size // vision.patch_size) ** 2
        with seeded(run.seed, "teacher"):
            self.names = nn.Linear(vision.hidden_size, 1 + num_names)
            self.boxes = nn.Linear(vision.hidden_size, 4)
        for name, values in (("mean", vision.image_mean), ("std", vision.image_std)):
            self.register_buffer(name, torch.tensor(list(values)).view(1, 3, 1, 1))
        self._half = run.precision.name == "bf16"

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, 3, H, W]`` bytes to the scores ``[N, P, names]`` and boxes ``[N, P, 4]`` of patches, in float32."""
        normalised = self.normalised(pixels)
        with torch.autocast(pixels.device.type, torch.bfloat16) if self._half else contextlib.nullcontext():
            features = encoder_features(self.tower, normalised, self._layer, self._patches)
        features = F.dropout(features.float(), DROPOUT, self.training)
        return self.names(features), self.boxes(features)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Bytes as the numbers that the tower takes."""
        return (pixels.float() / 255 - self.mean) / self.std

    def loss(self, pixels: Tensor, classes: Tensor, boxes: Tensor) -> Tensor:
        """Cross-entropy over patches with a label, and a smooth distance of boxes over those with an object."""
        scores, found = self(pixels)
        named = F.cross_entropy(scores.flatten(0, 1), classes.flatten(), ignore_index=NOTHING)
        shown = classes > NO_OBJECT
        if not shown.any():
            return named
        return named + BOX_WEIGHT * F.smooth_l1_loss(found[shown], boxes[shown], beta=BOX_BETA)


def teach_tower(
    run: RunConfig, scenes: Scenes, num_names: int, steps: int, batch: int, learning_rate: float, device: str
) -> Teacher:
    """A teacher whose tower has seen ``steps`` batches of ``batch`` scenes, drawn anew each time."""
    teacher = Teacher(run, num_names).to(device)
    generator = torch.Generator().manual_seed(run.seed)

    def loss_of_a_batch() -> Tensor:
        chosen = torch.randint(len(scenes), (batch,), generator=generator)
        parts = (scenes.pixels[chosen], scenes.classes[chosen], scenes.boxes[chosen])
        loss: Tensor = teacher.loss(*(part.to(device) for part in parts))
        return loss

    with torch.random.fork_rng():
        torch.manual_seed(run.seed)  # of dropout
        train(teacher.parameters(), loss_of_a_batch, steps, learning_rate, "encoder")
    return teacher.eval()


@torch.no_grad()
def measure(teacher: Teacher, scenes: Scenes, device: str) -> Accuracy:
    """How well a taught tower reads scenes."""
    right = {"objects": 0, "empty": 0}
    counts = {"objects": 0, "empty": 0}
    distance = 0.0
    parts: Any = zip(*(part.split(AT_A_TIME) for part in (scenes.pixels, scenes.classes, scenes.boxes)), strict=True)
    for pixels, classes, boxes in parts:
        scores, found = (each.cpu() for each in teacher(pixels.to(device)))
        for name, where in (("objects", classes > NO_OBJECT), ("empty", classes == NO_OBJECT)):
            right[name] += int((scores.argmax(-1) == classes)[where].sum())
            counts[name] += int(where.sum())
        shown = classes > NO_OBJECT
        distance += float((found - boxes).abs()[shown].sum()) / 4
    shares = {name: right[name] / max(1, counts[name]) for name in right}
    return Accuracy(**shares, box=distance / max(1, counts["objects"]), patches=counts["objects"])
