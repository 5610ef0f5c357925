"""AIMv2 at native resolution: images of any size, every patch a visual token, positions computed from the grid.

It is ``transformers``' own but for two things: the patches of all images of a micro-batch go through it as one row,
each attending within its image, and positions are computed in float32 whatever the weights are. ``transformers``
rounds their angles to the weights' type (bf16: sines and cosines are wrong by up to 0.29 on 30 x 40 patches, by 1.4%
of their norm) and multiplies them as matrices, which TF32 rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Aimv2VisionConfig, Aimv2VisionModel

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import transformers_values


class NativeAimv2Tower(Aimv2VisionModel):
    """``transformers``' tower with its parameters' names, up to the layer whose features are taken."""

    def __init__(self, config: Aimv2VisionConfig, feature_layer: int) -> None:
        super().__init__(config)
        self.num_used_layers = feature_layer % (config.num_hidden_layers + 1)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:  # type: ignore[override]
        """Features ``[tokens, hidden_size]``, image by image, row by row.

        Args:
            patches: ``[tokens, 1, 3 * patch_size ** 2]``, see :mod:`nemo_pre.data.native_images`.
            grids: rows and columns of visual tokens of each image.
        """
        side = self.config.patch_size
        hidden_states = self.embeddings.patch_embed(patches.reshape(-1, 3, side, side)).flatten(1)
        positions = torch.cat([_positions(*grid, self.config.hidden_size, patches.device) for grid in grids])
        hidden_states = (self.embeddings.rms_norm(hidden_states) + positions.to(hidden_states.dtype))[None]
        lengths = [rows * columns for rows, columns in grids]
        for layer in self.encoder.layers[: self.num_used_layers]:
            hidden_states = _layer(layer, hidden_states, lengths)
        return hidden_states[0]


def _positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """float32 ``[rows * columns, width]``: sines and cosines of the column, then of the row, fast to slow."""
    place = torch.arange(rows * columns, device=device)
    frequencies = 10000.0 ** (-torch.arange(width // 4, device=device) / (width // 4))
    angles = [torch.outer(axis, frequencies) for axis in (place % columns, place // columns)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)


def _layer(layer: Any, hidden_states: Tensor, image_lengths: list[int]) -> Tensor:
    """A layer of the tower ``[1, tokens, hidden_size]``, of which only attention tells images apart."""
    images = layer.rms_norm1(hidden_states).split(image_lengths, dim=1)
    hidden_states = hidden_states + torch.cat([layer.attention(image)[0] for image in images], dim=1)
    feed_forward: Tensor = layer.ffn(layer.rms_norm2(hidden_states))
    return hidden_states + feed_forward


def build_native_aimv2(vision: VisionConfig) -> NativeAimv2Tower:
    return NativeAimv2Tower(Aimv2VisionConfig(**transformers_values(vision)), vision.feature_layer)
