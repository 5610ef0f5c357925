"""Qwen2.5-VL's vision transformer: images of any size, most layers attending within windows.

It is ``transformers``' own, up to its merger: the norm there and the 2 x 2 patches of a visual token side by side are
this tower's output, and the merger's MLP is the model's projector. So the projector is frozen, trained, averaged and
tapped as any other tower's, and the published weights of both parts have a place.

How its attention runs is ours. ``transformers`` asks the device how long every window is, in every layer, and attends
window by window (it has variable-length kernels for flash-attn only). Here windows are counted on the host, where the
grids are, tokens lie sorted by the size of their window, and all windows of one size are one call: no more calls in a
layer than sizes, which are at most nine for windows of 4 x 4 visual tokens, and no wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    apply_rotary_pos_emb_vision,
)

from nemo_pre.config.schema import VisionConfig
from nemo_pre.config.vision_families import transformers_values
from nemo_pre.device_copies import to_device

Grids = Sequence[tuple[int, int]]
Groups = list[tuple[int, int]]  # how many groups of tokens that see each other follow one another, and their size


@dataclass(frozen=True)
class Arrangement:
    """An order of visual tokens in which those that attend to each other lie together, groups of one size in a row.

    Attributes:
        token: ``[tokens]`` the visual token at each place, numbered image by image, row by row; on the CPU.
        groups: in visual tokens.
    """

    token: Tensor
    groups: Groups

    @classmethod
    def of(cls, parts: list[Tensor]) -> Arrangement:
        """The order for the visual tokens of every window, or of every image."""
        parts = sorted(parts, key=len)  # stable
        sizes = [(len(list(alike)), size) for size, alike in groupby(parts, key=len)]
        return cls(torch.cat(parts), sizes)


class NativeQwenVLTower(Qwen2_5_VisionTransformerPretrainedModel):
    """``transformers``' tower with its parameters' names, but for the merger's MLP, which it does not have."""

    def __init__(self, config: Qwen2_5_VLVisionConfig) -> None:
        super().__init__(config)
        self.merger.mlp = nn.Identity()
        self.rotary_pos_emb = _Angles(config.hidden_size // config.num_heads // 2)

    def forward(self, patches: Tensor, grids: Grids) -> Tensor:  # type: ignore[override]
        """Features ``[tokens, 4 * hidden_size]``, image by image, row by row.

        Args:
            patches: ``[tokens, 4, 3 * patch_size ** 2]``, see :mod:`nemo_pre.data.native_images`.
            grids: rows and columns of visual tokens of each image.
        """
        device, merge = patches.device, self.spatial_merge_size
        windows = Arrangement.of(window_tokens(grids, self.window_size // merge // self.patch_size))
        images = Arrangement.of(image_tokens(grids))
        to_image = windows.token.argsort()[images.token]  # where the images' order finds its tokens among the windows'
        places = patch_places(grids, merge)
        waves = {}
        for kind, arrangement in (("windows", windows), ("images", images)):
            angles = self.rotary_pos_emb(to_device(places[arrangement.token].flatten(0, 1), device))
            waves[kind] = tuple(wave(torch.cat((angles, angles), dim=-1)) for wave in (torch.cos, torch.sin))

        frame = patches.reshape(-1, 3, 1, self.patch_size**2)
        # A picture is a film of two equal frames.
        hidden_states = self.patch_embed(frame.expand(-1, -1, self.config.temporal_patch_size, -1).flatten(1))
        hidden_states = self._arranged(hidden_states, to_device(windows.token, device))
        orders = {"images": to_device(to_image, device), "windows": to_device(to_image.argsort(), device)}
        kind = "windows"
        for number, block in enumerate(self.blocks):
            wanted = "images" if number in self.fullatt_block_indexes else "windows"
            if wanted != kind:
                hidden_states, kind = self._arranged(hidden_states, orders[wanted]), wanted
            groups = (images if kind == "images" else windows).groups
            patch_groups = [(count, size * self.spatial_merge_unit) for count, size in groups]
            attended = _attention(block.attn, block.norm1(hidden_states), waves[kind], patch_groups)
            hidden_states = hidden_states + attended
            hidden_states = hidden_states + block.mlp(block.norm2(hidden_states))
        back = (images if kind == "images" else windows).token.argsort()
        features: Tensor = self.merger(hidden_states)
        return features.index_select(0, to_device(back, device))

    def _arranged(self, hidden_states: Tensor, order: Tensor) -> Tensor:
        """Patches in another order of the visual tokens that they belong to."""
        return hidden_states.unflatten(0, (-1, self.spatial_merge_unit)).index_select(0, order).flatten(0, 1)


def build_native_qwen_vl(vision: VisionConfig) -> NativeQwenVLTower:
    return NativeQwenVLTower(Qwen2_5_VLVisionConfig(**transformers_values(vision)))


def image_tokens(grids: Grids) -> list[Tensor]:
    """The visual tokens of each image."""
    numbers, first = [], 0
    for rows, columns in grids:
        numbers.append(torch.arange(first, first := first + rows * columns))
    return numbers


def window_tokens(grids: Grids, side: int) -> list[Tensor]:
    """The visual tokens of each window of ``side`` x ``side`` of them, cut off at an image's right and lower edge."""
    windows = []
    for (rows, columns), tokens in zip(grids, image_tokens(grids), strict=True):
        for band in tokens.view(rows, columns).split(side, dim=0):
            windows += [window.flatten() for window in band.split(side, dim=1)]
    return windows


def patch_places(grids: Grids, merge: int) -> Tensor:
    """Row and column ``[tokens, merge ** 2, 2]`` in its image of every patch of a visual token, row by row."""
    inside = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))
    tokens = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in grids]
    return merge * torch.cat(tokens)[:, None] + inside


def _attention(attention: Any, hidden_states: Tensor, waves: tuple[Tensor, ...], groups: Groups) -> Tensor:
    """``transformers``' attention ``[patches, hidden_size]`` within each group of patches, one call for each size."""
    query, key, value = attention.qkv(hidden_states).unflatten(1, (3, attention.num_heads, -1)).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *waves)
    attended, first = [], 0
    for count, size in groups:
        own = slice(first, first := first + count * size)
        alike = (tensor[own].unflatten(0, (count, size)).transpose(1, 2) for tensor in (query, key, value))
        context = F.scaled_dot_product_attention(*alike, scale=attention.scaling)
        attended.append(context.transpose(1, 2).flatten(2).flatten(0, 1))
    return attention.proj(torch.cat(attended))


class _Angles(nn.Module):
    """``transformers``' rotary angles in float32: a buffer would become bf16 with the model."""

    def __init__(self, width: int, base: float = 10000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
        self.inverse_frequency = 1.0 / base**exponents

    def forward(self, places: Tensor) -> Tensor:
        """Angles ``[patches, width]`` of rows, then of columns, ``places`` ``[patches, 2]``."""
        if self.inverse_frequency.device != places.device:
            self.inverse_frequency = to_device(self.inverse_frequency, places.device)
        return (places[..., None] * self.inverse_frequency).flatten(1)
