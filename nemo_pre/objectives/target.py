"""What objectives compare visual tokens with beside the model itself: features of frozen vision models."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """A frozen vision model whose patch features an objective wants of every picture.

    Attributes:
        name: of the objective, and of its features in a batch.
        prefix: what the options about this model begin with: those of ``objective.pre.external`` are
            ``objective.pre.external_path``, ``..._image_size`` and ``..._features``.
        path: directory or hub id; None only where features are read.
        image_size: pixels a picture is resized to, a square; None: the model's own.
        image_filter: of that resizing, ``bicubic`` or ``bilinear``.
        features: directory of ``nemo-pre data features of=...``, which is read instead of running the model.
    """

    name: str
    prefix: str
    path: str | None
    image_size: int | None = None
    image_filter: str = "bicubic"
    features: str | None = None

    @property
    def objective(self) -> str:
        """The option group of the objective: the word behind ``of=``."""
        return self.prefix.rpartition(".")[0]

    def option(self, name: str) -> str:
        """The full name of one of the options about this model."""
        return f"{self.prefix}_{name}"
