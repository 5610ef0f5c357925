"""AIMv2 at native resolution in the place of Qwen2.5-VL's vision tower: every patch is a visual token.

It is transformers' Aimv2VisionModel, one image after the other, with a projector behind it. Positions are computed in
float32 whatever the weights are, as in training; transformers rounds their angles to the weights' type.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Aimv2VisionConfig, Aimv2VisionModel


class NativeAimv2(Aimv2VisionModel):
    """Visual tokens of images of any size.

    Args:
        config: with ``feature_layer``, the index into the tower's hidden states that the projector sees, and
            ``out_hidden_size``, the language model's width.
    """

    spatial_merge_size = 1

    def __init__(self, config: Aimv2VisionConfig) -> None:
        super().__init__(config)
        width, out = config.hidden_size, config.out_hidden_size
        self.merger = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))})
        inexact = self.embeddings.build_2d_sincos_position_embedding
        self.embeddings.build_2d_sincos_position_embedding = partial(_in_float32, inexact)

    def forward(self, pixel_values: Tensor, grid_thw: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """``[tokens, out_hidden_size]``, image by image, row by row.

        Args:
            pixel_values: ``[tokens, 3 * patch_size ** 2]``, the patches of all images.
            grid_thw: 1, rows and columns of each image.
        """
        side, features = self.config.patch_size, []
        for patches, (_, rows, columns) in zip(
            pixel_values.split(grid_thw.prod(1).tolist()), grid_thw.tolist(), strict=True
        ):
            image = patches.view(rows, columns, 3, side, side).permute(2, 0, 3, 1, 4)
            image = image.reshape(1, 3, rows * side, columns * side)
            hidden_states = super().forward(image, output_hidden_states=True).hidden_states
            features.append(hidden_states[self.config.feature_layer][0])
        tokens: Tensor = self.merger["mlp"](torch.cat(features))
        return tokens


def _in_float32(build: Any, *size: Any, dtype: torch.dtype, **how: Any) -> Tensor:
    positions: Tensor = build(*size, **how, dtype=torch.float32)
    return positions.to(dtype)
