"""Rotary positions of text and visual tokens, for one position per token or for one per axis of the image.

2D-RoPE as in LaVer (arXiv 2512.06281, its architecture figure): text token number p is at (p, p); patch (i, j) of an
image that starts at s is at (s + i, s + j); what follows the image is at the largest position so far plus one. M-RoPE,
which LaVer's released code takes over from Qwen2-VL, adds a time axis that stays at s for the whole image.

Shape suffixes: B micro-batch, S sequence, T tiles of the micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_pre.config.schema import ModelConfig
from nemo_pre.options import choices_of
from nemo_pre.parallel.sequence_layout import SequenceLayout


def rotary_positions(layout: SequenceLayout, grids_T2: Tensor, kind: str, isolated_images: bool = False) -> Tensor:
    """Positions int64 ``[3, B, S]`` along time, row and column.

    Args:
        layout: the sequence; on the CPU. Every packed sample starts at 0.
        grids_T2: height and width in visual tokens of every tile, in the order of the visual tokens. An image of
            several tiles is a block per tile, each starting where the one before it ends.
        kind: ``1d`` (every token its index, on all axes), ``2d`` or ``mrope`` (the axes differ; which of them turns
            which frequency is decided in :mod:`nemo_pre.neva.rotary`).
        isolated_images: every image is a sequence of its own and starts at 0.

    Raises:
        ValueError: an unknown kind, or a grid that has fewer tokens than the layout.
    """
    if kind not in choices_of(ModelConfig, "rope"):
        raise ValueError(f"Rotary positions are '{kind}': choose one of {', '.join(choices_of(ModelConfig, 'rope'))}.")
    batch, length = layout.visual_source_BS.shape
    is_visual_BS = layout.visual_source_BS >= 0
    if kind == "1d":
        start_BS = torch.arange(length).expand(batch, length)
        row_BS = column_BS = torch.zeros_like(start_BS)
    else:
        row_BS, column_BS, advance_BS = _places_in_tiles(layout.visual_source_BS, is_visual_BS, grids_T2)
        start_BS = advance_BS.cumsum(1) - advance_BS
    start_BS = start_BS - _first_of_segment(start_BS, layout.segment_BS)
    if isolated_images:
        start_BS = torch.where(is_visual_BS, start_BS - _first_of_image(start_BS, layout.visual_image_BS), 0)
    return torch.stack([start_BS, start_BS + row_BS, start_BS + column_BS])


def _places_in_tiles(source_BS: Tensor, is_visual_BS: Tensor, grids_T2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row and column of each visual token in its tile, and by how much each token moves the next position on."""
    if not is_visual_BS.any():
        zeros = torch.zeros_like(source_BS)
        return zeros, zeros, torch.ones_like(source_BS)
    sizes_T = grids_T2.prod(1)
    ends_T = sizes_T.cumsum(0)
    if not len(ends_T) or source_BS.max() >= ends_T[-1]:
        raise ValueError(
            f"The grids {grids_T2.tolist()} have fewer tokens than the {int(source_BS.max()) + 1} visual tokens."
        )
    tile_BS = torch.searchsorted(ends_T, source_BS.clamp(min=0), right=True)
    height_BS, width_BS = grids_T2[tile_BS].unbind(-1)
    in_tile_BS = source_BS - (ends_T - sizes_T)[tile_BS]
    is_last_BS = in_tile_BS == sizes_T[tile_BS] - 1
    advance_BS = torch.where(is_visual_BS, is_last_BS * torch.maximum(height_BS, width_BS), 1)
    row_BS = torch.where(is_visual_BS, in_tile_BS // width_BS, 0)
    column_BS = torch.where(is_visual_BS, in_tile_BS % width_BS, 0)
    return row_BS, column_BS, advance_BS


def _first_of_segment(start_BS: Tensor, segment_BS: Tensor) -> Tensor:
    """Where the packed sample of each token starts; positions only grow along a row."""
    is_first_BS = torch.zeros_like(segment_BS, dtype=torch.bool)
    is_first_BS[:, 1:] = segment_BS[:, 1:] != segment_BS[:, :-1]
    return torch.where(is_first_BS, start_BS, 0).cummax(dim=1).values


def _first_of_image(start_BS: Tensor, image_BS: Tensor) -> Tensor:
    """Where the image of each visual token starts; of no meaning elsewhere."""
    image = image_BS.clamp(min=0)
    first = torch.full((int(image.max()) + 1,), torch.iinfo(torch.int64).max)
    inside = image_BS >= 0
    first.scatter_reduce_(0, image_BS[inside], start_BS[inside], "amin")
    return first[image]
