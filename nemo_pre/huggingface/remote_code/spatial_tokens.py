"""Where the visual tokens of a sequence lie and what they see: for models with mixed attention and rotary positions
on several axes.

Source: LaVer, arXiv 2512.06281. Everything follows from the token ids and the padding mask of the whole sequence, so
that nothing is remembered from one step of generation to the next.

Shape suffixes: B batch, S tokens so far, Q the last of them, which a forward computes (without a cache, all), D head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Grid = tuple[int, int]  # rows and columns of an image's visual tokens
ATTENTION = ("eager", "sdpa")  # those that take any mask


@dataclass
class VisualStructure:
    """Where every token of a batch lies.

    Attributes:
        image_BS: its image, counted along its row of the batch; -1 for text.
        row_BS, column_BS: its place in the image; 0 for text.
        advance_BS: by how much the position grows after it: 1 after text, after an image its longer side.
    """

    image_BS: Tensor
    row_BS: Tensor
    column_BS: Tensor
    advance_BS: Tensor


def visual_structure(ids_BS: Tensor, image_token: int, grids: Sequence[Sequence[Grid]]) -> VisualStructure:
    """The structure of a batch whose rows have images with these ``grids``; image tokens beyond them are text."""
    tables = [_table(of_row) for of_row in grids]
    longest = max(table.shape[1] for table in tables)
    text = torch.tensor([-1, 0, 0, 1])[:, None]
    table_4BN = torch.stack([torch.cat([t, text.expand(-1, longest + 1 - t.shape[1])], dim=1) for t in tables], dim=1)
    is_image_BS = ids_BS == image_token
    number_BS = torch.where(is_image_BS, is_image_BS.cumsum(1) - 1, longest).clamp(max=longest)
    found_4BS = table_4BN.to(ids_BS.device).gather(2, number_BS.expand(4, -1, -1))
    return VisualStructure(*found_4BS)


def _table(grids: Sequence[Grid]) -> Tensor:
    """Image, row, column and advance ``[4, N]`` of the visual tokens of some images."""
    parts = [torch.empty(4, 0, dtype=torch.long)]
    for image, (rows, columns) in enumerate(grids):
        number = torch.arange(rows * columns)
        advance = torch.where(number == rows * columns - 1, max(rows, columns), 0)
        parts.append(torch.stack([torch.full_like(number, image), number // columns, number % columns, advance]))
    return torch.cat(parts, dim=1)


def spatial_positions(tokens: VisualStructure, real_BS: Tensor, rope: str) -> Tensor:
    """Positions ``[3, B, S]`` along time, row and column.

    Text number p is at (p, p, p); patch (i, j) of an image that starts at s is at (s, s + i, s + j); what follows is
    at the largest position so far plus one. For ``1d`` all axes count the tokens. Padding does not count.
    """
    if rope == "1d":
        return (real_BS.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    advance_BS = tokens.advance_BS * real_BS
    start_BS = advance_BS.cumsum(1) - advance_BS
    return torch.stack([start_BS, start_BS + tokens.row_BS, start_BS + tokens.column_BS])


def mixed_attention_mask(image_BS: Tensor, real_BS: Tensor, num_queries: int) -> Tensor:
    """Boolean ``[B, 1, Q, S]``, which tokens each query sees: those not after it and those of its own image.

    Padding is seen by no other token, and sees itself so that no row of the mask is empty.
    """
    index_S = torch.arange(image_BS.shape[1], device=image_BS.device)
    query_Q1 = index_S[-num_queries:, None]
    image_BQ1 = image_BS[:, -num_queries:, None]
    same_image_BQS = (image_BQ1 == image_BS[:, None]) & (image_BQ1 >= 0)
    seen_BQS = ((index_S <= query_Q1) | same_image_BQS) & real_BS[:, None]
    return (seen_BQS | (index_S == query_Q1))[:, None]


class SpatialRotaryEmbedding(nn.Module):
    """The text model's own rotary embedding, each frequency turned by the position on its axis.

    Args:
        stock: the text model's, which knows its rope scaling.
        axes: of each frequency, 0 time, 1 row, 2 column.
        three: whether ``stock`` takes positions of three axes and gives angles of each, of which the text model's
            layers choose; then all three are the ones that ``axes`` say.
    """

    def __init__(self, stock: nn.Module, axes: list[int], three: bool = False) -> None:
        super().__init__()
        self.stock = stock
        self.axes = axes
        self.three = three

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B, Q, D]``, or ``[3, B, Q, D]``, of the angles at ``position_ids`` ``[3, B, Q]``."""
        if position_ids.ndim != 3:
            raise ValueError("Call the whole model, not its text model: positions have 3 axes.")
        _, batch, length = position_ids.shape
        axis_D = torch.tensor(self.axes + self.axes, device=x.device)  # the halves of a head share their frequencies
        index_1BQD = axis_D.expand(1, batch, length, -1)
        if self.three:
            cos, sin = (values.gather(0, index_1BQD) for values in self.stock(x, position_ids))
            return cos.expand(3, -1, -1, -1), sin.expand(3, -1, -1, -1)
        of_all_axes = self.stock(x, position_ids.flatten(0, 1))  # at once: some scalings look at the largest position
        cos, sin = (values.unflatten(0, (3, batch)).gather(0, index_1BQD)[0] for values in of_all_axes)
        return cos, sin


def check_choices(config: Any, num_frequencies: int) -> None:
    """Refuse a configuration that this code does not implement.

    Raises:
        ValueError: ``visual_attention``, ``visual_rope`` or ``rope_axes`` is none that there is, or does not fit; or
            the text model attends within a window.
    """
    axes = config.rope_axes
    if getattr(config.text_config, "use_sliding_window", False):
        raise ValueError("text_config.use_sliding_window must be false: the attention mask knows no window.")
    if config.visual_attention not in ("causal", "mixed"):
        raise ValueError(f"visual_attention is '{config.visual_attention}': choose causal or mixed.")
    if config.visual_rope not in ("1d", "2d", "mrope"):
        raise ValueError(f"visual_rope is '{config.visual_rope}': choose 1d, 2d or mrope.")
    if config.visual_rope == "1d" and axes is not None:
        raise ValueError(f"rope_axes={axes} must be null for visual_rope=1d.")
    fit = axes is not None and len(axes) == num_frequencies and set(axes) <= {0, 1, 2}
    if config.visual_rope != "1d" and not fit:
        raise ValueError(
            f"rope_axes={axes} must be {num_frequencies} numbers, each 0 (time), 1 (row) or 2 (column), one for each "
            f"rotary frequency of a head, for visual_rope={config.visual_rope}."
        )


def whole_sequence(
    input_ids: Tensor, sequence_ids: Tensor | None, attention_mask: Tensor | None, cache: Any
) -> tuple[Tensor, Tensor]:
    """The ids ``[B, S]`` of all tokens so far, and which of them are real.

    Raises:
        ValueError: with a filled cache the ids are not those of all tokens; or the mask is not for all of them.
    """
    ids_BS = input_ids if sequence_ids is None else sequence_ids
    num_cached = 0 if cache is None else cache.get_seq_length()
    if ids_BS.shape[1] != num_cached + input_ids.shape[1]:
        raise ValueError(
            f"{num_cached} tokens are cached and {input_ids.shape[1]} are new: pass the ids of all of them as "
            f"sequence_ids, which generate does for a prompt in one piece."
        )
    if attention_mask is None:
        return ids_BS, torch.ones_like(ids_BS).bool()
    if attention_mask.shape != ids_BS.shape:
        raise ValueError(
            f"attention_mask has shape {list(attention_mask.shape)}: it must have {list(ids_BS.shape)}, the batch and "
            f"all tokens so far."
        )
    return ids_BS, attention_mask.bool()


def mask_and_positions(
    config: Any, tokens: VisualStructure, real_BS: Tensor, num_new: int, has_pixels: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """``attention_mask`` and ``position_ids`` ``[3, B, Q]`` of the text model, which makes a mask ``[B, S]`` causal.

    Raises:
        ValueError: an image among the new tokens, without its pixels.
    """
    positions_3BS = spatial_positions(tokens, real_BS, config.visual_rope)
    has_images = bool((tokens.image_BS[:, -num_new:] >= 0).any())
    if has_images and not has_pixels:
        raise ValueError("input_ids hold an image, so pass pixel_values; generate does with an empty cache only.")
    mask = real_BS.long()
    if has_images and config.visual_attention == "mixed":
        seen = mixed_attention_mask(tokens.image_BS, real_BS, num_new)
        mask = torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return mask, positions_3BS[:, :, -num_new:]


def check_attention(*configs: Any) -> None:
    """Refuse an implementation of attention that would drop the mask.

    Raises:
        ValueError: an implementation of attention that does not take any mask.
    """
    for config in configs:
        chosen = config._attn_implementation
        if chosen not in (None, *ATTENTION):
            raise ValueError(f"attn_implementation is '{chosen}': choose {' or '.join(ATTENTION)}.")


def check_cache(cache: Any) -> None:
    """Refuse a cache that does not tell how many tokens it holds.

    Raises:
        ValueError: a cache of a fixed length, in which the number of tokens so far is not seen.
    """
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"{type(cache).__name__} has a fixed length: leave cache_implementation out.")
