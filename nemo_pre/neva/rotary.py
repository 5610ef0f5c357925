"""Rotary embedding of tokens that have a position on each axis of an image.

Source: LaVer (arXiv 2512.06281, section on 2D-RoPE; how the frequencies are shared between the axes is not
published) and its released code (Qwen2-VL's M-RoPE, sections 16, 24, 24 of 64 frequencies).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nemo_pre.config.schema import RopeScalingConfig
from nemo_pre.device_copies import to_device


def inverse_frequency(head_dim: int, base: float, scaling: RopeScalingConfig) -> Tensor:
    """Radians per position, float32 ``[head_dim / 2]``, fastest first.

    ``llama3`` leaves the fast frequencies, slows the slow ones down by ``factor`` and blends between (Llama 3.1's
    release; as ``transformers`` computes it).
    """
    fast = 1.0 / (base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if scaling.kind == "none":
        return fast
    slow = fast / scaling.factor
    if scaling.kind == "linear":
        return slow
    turns = scaling.original_positions * fast / (2 * math.pi)  # in the original context
    span = scaling.high_freq_factor - scaling.low_freq_factor
    share = ((turns - scaling.low_freq_factor) / span).clamp(0, 1)
    return (1 - share) * slow + share * fast


class VisualRotaryEmbedding(nn.Module):
    """Rotary embedding in the place of Megatron's ``MultimodalRotaryEmbedding``, whose interface it has.

    Args:
        inverse_frequency: see :func:`inverse_frequency`.
        axes: see :func:`nemo_pre.config.derived.axis_of_frequency`.

    Where all axes agree, as for text, the angles are bit for bit those of Megatron's ``RotaryEmbedding``.
    """

    def __init__(self, inverse_frequency: Tensor, axes: list[int]) -> None:
        super().__init__()
        assert len(axes) == len(inverse_frequency)
        self.inverse_frequency = inverse_frequency
        self.axes = torch.tensor(axes)

    def forward(self, positions_3BQ: Tensor, mrope_section: object = None, cp_group: object = None) -> Tensor:
        """Angles float32 ``[Q, B, 1, head_dim]`` of this rank's tokens. ``mrope_section`` and ``cp_group`` are
        Megatron's and unused: positions are given, of the tokens that this rank has."""
        if self.inverse_frequency.device != positions_3BQ.device:
            self.inverse_frequency = to_device(self.inverse_frequency, positions_3BQ.device)
            self.axes = to_device(self.axes, positions_3BQ.device)
        # [frequencies, B, Q] -> [Q, B, frequencies]
        position = positions_3BQ[self.axes].permute(2, 1, 0).to(torch.float32)
        angles = position * self.inverse_frequency
        return torch.cat([angles, angles], dim=-1)[:, :, None]
