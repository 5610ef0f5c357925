"""The features of a frozen vision model that a term compares visual tokens with: computed, or read beside the
images."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_pre.data.features import read_features
from nemo_pre.objectives.target import Target
from nemo_pre.parallel.micro_batch import VisualTokens
from nemo_pre.terms.frozen_vision import FrozenVision
from nemo_pre.terms.training import VisualChunk
from nemo_pre.terms.vision_facts import vision_facts


class TargetFeatures:
    """What an objective's target says of every visual token.

    Args:
        target: the frozen model, or where its output lies.
    """

    dtype = torch.float32  # in which they are computed, and sent to other stages

    def __init__(self, target: Target) -> None:
        self.target = target
        self._model: FrozenVision | None = None

    @property
    def width(self) -> int:
        """Width of the features, the same on every rank."""
        if self.target.features is not None:
            return read_features(self.target.features, self.target.option("features")).width
        return vision_facts(self.target).width

    def install(self, chunk: VisualChunk) -> None:
        """Load the model on the first stage, where features are not read."""
        if self.target.features is None:
            vision, device = chunk.config.vision_transformer_config, next(chunk.vision_projection.parameters()).device
            self._model = FrozenVision(self.target, device, vision.image_mean, vision.image_std)

    def remove(self) -> None:
        """Forget the model."""
        self._model = None

    def of(self, chunk: VisualChunk, visual: VisualTokens) -> Tensor:
        """Features ``[n, width]`` of all ``n`` visual tokens of a micro-batch, on the first stage."""
        if not len(visual.tokens):
            return visual.tokens.new_zeros(0, self.width)
        if self._model is None:
            return visual.targets[self.target.name]
        assert visual.images is not None, "the loader gives pixels where an objective looks at pictures"
        return self._model(visual.images, chunk.tile_tokens).flatten(0, 1)
