"""Whole images brought together where sequence or context parallelism cuts them apart.

A matrix of an image's tokens with each other needs all of them. Every rank has some tokens of an image, all ranks'
tokens are gathered, and each rank compares its share of the images (image i goes to rank i modulo ranks), so that no
entry is counted twice. Gradients go back by the reduce-scatter of that gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.device_copies import to_device
from nemo_pre.parallel.gather import gather_first_dimension
from nemo_pre.parallel.sequence_layout import SequenceLayout, local_positions, local_visual_tokens
from nemo_pre.parallel.token_streams import gathered_order

Tokens = TypeVar("Tokens", bound="ImageTokens")


@dataclass(frozen=True)
class ImageTokens:
    """Index tensors; all but those that ``on_host`` names lie on the device.

    Attributes:
        position: ``[n]`` place of this rank's visual tokens in ``hidden_states.reshape(L * B, d)``.
        own_place: ``[k]`` place, in the gathered ``[ranks * L * B, d]``, of all tokens of the images that this rank
            compares, image by image.
        own_image: ``[k]`` image of each, on the CPU.
    """

    position: Tensor
    own_place: Tensor
    own_image: Tensor
    on_host: ClassVar[tuple[str, ...]] = ("own_image",)

    def to(self: Tokens, device: torch.device | str | int) -> Tokens:
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return type(self)(
            **{name: value if name in self.on_host else to_device(value, device) for name, value in values.items()}
        )


@dataclass(frozen=True)
class OwnTokens:
    """Where the tokens of the images that this rank compares lie, image by image.

    Attributes:
        row, column: ``[k]`` in the layout, ``[B, S]``.
        place: ``[k]`` in the gathered ``[ranks * L * B, d]``.
        image: ``[k]`` of each.
    """

    row: Tensor
    column: Tensor
    place: Tensor
    image: Tensor


def image_tokens(layout: SequenceLayout, tp_size: int, tp_rank: int, cp_size: int, cp_rank: int) -> ImageTokens:
    """The images' tokens on this rank: worked out on the CPU, on every rank for itself.

    Args:
        tp_size, tp_rank: of sequence parallelism, 1 and 0 without it.
    """
    here_L = local_positions(layout.sequence_length, tp_size, tp_rank, cp_size, cp_rank)
    own = own_tokens(layout, tp_size, tp_rank, cp_size, cp_rank)
    return ImageTokens(local_visual_tokens(layout, here_L).position, own.place, own.image)


def own_tokens(
    layout: SequenceLayout, tp_size: int, tp_rank: int, cp_size: int, cp_rank: int, together: bool = False
) -> OwnTokens:
    """The tokens of the images that this rank compares.

    Args:
        together: all images are compared with each other, on the first rank.
    """
    batch, length = layout.visual_source_BS.shape
    ranks, rank = tp_size * cp_size, cp_rank * tp_size + tp_rank
    place_S = torch.empty(length, dtype=torch.int64)
    place_S[gathered_order([length], tp_size, cp_size)] = torch.arange(length)
    owner_BS = torch.zeros_like(layout.visual_image_BS) if together else layout.visual_image_BS % ranks
    row, column = torch.where((layout.visual_image_BS >= 0) & (owner_BS == rank))
    image = layout.visual_image_BS[row, column]
    by_image = image.argsort(stable=True)
    row, column, image = row[by_image], column[by_image], image[by_image]
    return OwnTokens(row, column, place_S[column] * batch + row, image)


def whole_images(values: Tensor, tokens: ImageTokens, num_places: int, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    """Values ``[k, d]`` of all tokens of the images this rank compares, from everyone's ``[n, d]``.

    Args:
        num_places: L * B, the same on every rank.
        groups: what the sequence is cut over: sequence parallelism's, then context parallelism's; only those of
            more than one rank.
    """
    gathered = values.new_zeros(num_places, values.shape[1]).index_copy(0, tokens.position, values)
    for group in groups:
        gathered = gather_first_dimension(gathered, group)
    return gathered[tokens.own_place]
