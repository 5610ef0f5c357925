"""FP8 tensors as Transformer Engine 2.9.0 keeps them, without their contents.

Read from its sources (``transformer_engine/pytorch/``), on GPUs before Blackwell, whose FP8 matrix products take both
factors row by row, so that a weight's gradient and an input's need transposed copies:
``delayed`` and ``tensorwise`` scale a tensor as a whole (``tensor/storage/float8_tensor_storage.py:191``: a byte an
element for each of the two copies), ``blockwise`` activations by 128 elements of a row, or of a column for the
transposed copy, and weights by 128 x 128 (``tensor/float8_blockwise_tensor.py:95``: a byte an element, and scales in
float32).
What scales a tensor as a whole, a float32, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.compat.rehearsed_te_autocast import Recipe

BLOCK = 128  # elements that share a scale


class NotTransformerEngines(ValueError):
    """A shape or an option that Transformer Engine refuses, or that has no stand-in."""


@dataclass
class Quantized:
    """The copies of a matrix ``[M, K]``: its rows, the transposed one's, and their scales."""

    row: Tensor | None = None
    row_scales: Tensor | None = None
    column: Tensor | None = None
    column_scales: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [each for each in (self.row, self.row_scales, self.column, self.column_scales) if each is not None]

    def drop_rows(self) -> None:
        self.row = self.row_scales = None


def quantized(
    tensor: Tensor, recipe: Recipe, rows: bool = True, columns: bool = False, weight: bool = False
) -> Quantized:
    """The copies of ``[M, K]`` that a quantizer makes.

    Raises:
        NotTransformerEngines: a side is no multiple of what FP8 matrix products take.
    """
    lines, width = tensor.shape
    if lines % 8 or width % 16:  # utils.py:486, assert_dim_for_fp8_exec
        raise NotTransformerEngines(f"FP8 is given [{lines}, {width}], no multiples of 8 and 16.")
    found = Quantized()
    if rows:
        found.row = tensor.new_zeros((lines, width), dtype=torch.uint8)
    if columns:
        found.column = tensor.new_zeros((width, lines), dtype=torch.uint8)
    if recipe.blockwise:
        if rows:
            found.row_scales = _scales(tensor, lines, width, weight)
        if columns:
            found.column_scales = _scales(tensor, width, lines, weight)
    return found


def _scales(tensor: Tensor, lines: int, width: int, weight: bool) -> Tensor:
    """Scales of rows ``[lines, width]``, padded to four."""
    across = -(-width // BLOCK)
    shape = (-(-lines // BLOCK), -(-across // 4) * 4) if weight else (across, -(-lines // 4) * 4)
    return tensor.new_empty(shape, dtype=torch.float32)


def gathered(local: Quantized, recipe: Recipe, group: Any, rows: bool, columns: bool) -> Quantized:
    """``[M, K]`` of all ranks of the group, from each one's rows (``distributed.py:903`` and ``:1053``).

    Rows travel; copies of columns are made of them when all are there, but by blocks, whose scales differ: there they
    travel by themselves, as they lie, and are transposed afterwards.
    """
    found = Quantized()
    if recipe.blockwise:
        if rows:
            assert local.row is not None and local.row_scales is not None
            scales = _all(local.row_scales.view(local.row.shape[0], -1), group)  # line by line, as rows travel
            found.row_scales, found.row = scales.t().clone(), _all(local.row, group)
        if columns:
            assert local.column is not None and local.column_scales is not None
            found.column_scales = _all(local.column_scales, group)
            found.column = _all(local.column.view(local.column.shape[::-1]), group).t().clone()
        return found
    assert local.row is not None
    found.row = _all(local.row, group)
    if columns:
        found.column = found.row.new_zeros((found.row.shape[1], found.row.shape[0]))
    return found


def _all(local: Tensor, group: Any) -> Tensor:
    out = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
    dist.all_gather_into_tensor(out, local, group=group)
    return out
