"""Qwen2.5-VL's vision transformer: images of any size, most layers attending within windows.

It is ``transformers``' own, up to its merger: the norm there and the 2 x 2 patches of a visual token side by side are
this tower's output, and the merger's MLP is the model's projector. So the projector is frozen, trained, averaged and
tapped as any other tower's, and the published weights of both parts have a place.

On a GPU ``transformers`` runs the windows one by one (it has variable-length kernels for flash-attn only).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import transformers_values


class NativeQwenVLTower(Qwen2_5_VisionTransformerPretrainedModel):
    """``transformers``' tower with its parameters' names, but for the merger's MLP, which it does not have."""

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__(config)
        self.merger.mlp = nn.Identity()
        self.rotary_pos_emb = _Angles(config.hidden_size // config.num_heads // 2)

    def rot_pos_emb(self, grid_thw: Tensor) -> Tensor:
        return super().rot_pos_emb(grid_thw).to(self.patch_embed.proj.weight.device)

    def forward(self, patches: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:  # type: ignore[override]
        """Features ``[tokens, 4 * hidden_size]``, image by image, row by row.

        Args:
            patches: ``[tokens, 4, 3 * patch_size ** 2]``, see :mod:`nemo_pre.data.native_images`.
            grids: rows and columns of visual tokens of each image.
        """
        frame = patches.reshape(-1, 3, 1, self.patch_size**2)
        merge = self.spatial_merge_size
        # A picture is a film of two equal frames.
        frames = frame.expand(-1, -1, self.config.temporal_patch_size, -1).flatten(1)
        sizes = torch.tensor([[1, merge * rows, merge * columns] for rows, columns in grids])
        features: Tensor = super().forward(frames, sizes)
        return features


def build_native_qwen_vl(vision: VisionConfig) -> NativeQwenVLTower:
    return NativeQwenVLTower(Qwen2_5_VLVisionConfig(**transformers_values(vision)))


class _Angles(nn.Module):
    """``transformers``' rotary angles, float32 and on the CPU: a buffer would become bf16 with the model."""

    def __init__(self, width: int, base: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        self.inverse_frequency = 1.0 / base**exponents

    def forward(self, length: Any) -> Tensor:
        return torch.outer(torch.arange(int(length), dtype=torch.float32, device="cpu"), self.inverse_frequency)
