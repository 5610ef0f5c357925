"""Rotary embedding of tokens that have a position on each axis of an image.

Source: LaVer (arXiv 2512.06281, section on 2D-RoPE; how the frequencies are shared between the axes is not
published) and its released code (Qwen2-VL's M-RoPE, sections 16, 24, 24 of 64 frequencies).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class VisualRotaryEmbedding(nn.Module):
    """In the place of Megatron's ``MultimodalRotaryEmbedding``, whose interface it has.

    Args:
        axes: see :func:`nemo_pre.config.derived.axis_of_frequency`.

    Where all axes agree, as for text, the angles are bit for bit those of Megatron's ``RotaryEmbedding``.
    """

    def __init__(self, head_dim: int, base: float, axes: list[int]) -> None:
        super().__init__()
        assert len(axes) == head_dim // 2
        self.inverse_frequency = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        self.axes = torch.tensor(axes)

    def forward(self, positions_3BQ: Tensor, mrope_section: object = None) -> Tensor:
        """Angles float32 ``[Q, B, 1, head_dim]`` of this rank's tokens. ``mrope_section`` is Megatron's and unused."""
        if self.inverse_frequency.device != positions_3BQ.device:
            self.inverse_frequency = self.inverse_frequency.to(positions_3BQ.device)
            self.axes = self.axes.to(positions_3BQ.device)
        # [frequencies, B, Q] -> [Q, B, frequencies]
        position = positions_3BQ[self.axes].permute(2, 1, 0).to(torch.float32)
        angles = position * self.inverse_frequency
        return torch.cat([angles, angles], dim=-1)[:, :, None]
