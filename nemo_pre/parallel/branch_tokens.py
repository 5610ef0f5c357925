"""The visual tokens of the branch on one rank, and which of them are masked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from nemo_pre.parallel.image_tokens import ImageTokens, own_tokens
from nemo_pre.parallel.sequence_layout import local_positions, local_visual_tokens
from nemo_pre.parallel.token_streams import StreamShape, VisualBranch


@dataclass(frozen=True)
class BranchTokens(ImageTokens):
    """The branch's :class:`ImageTokens`, with what is masked.

    Attributes:
        masked: ``[m]`` which of this rank's tokens are masked, as indices into ``position``.
        own_masked: ``[j]`` which tokens of the images that this rank compares are, as indices into ``own_place``.
        own_masked_image: ``[j]`` image of each, on the CPU.
    """

    masked: Tensor
    own_masked: Tensor
    own_masked_image: Tensor
    on_host: ClassVar[tuple[str, ...]] = ("own_image", "own_masked_image")


def branch_tokens(branch: VisualBranch, shape: StreamShape, tp_rank: int) -> BranchTokens:
    """The branch's tokens on this rank: worked out on the CPU, on every rank for itself.

    Args:
        tp_rank: this rank's place in sequence parallelism, 0 without it.
    """
    layout, cut = branch.layout, (shape.tp_size, tp_rank, shape.cp_size, shape.cp_rank)
    local = local_visual_tokens(layout, local_positions(layout.sequence_length, *cut))
    own = own_tokens(layout, *cut, together=branch.images_together)
    own_masked = branch.masked_N[layout.visual_source_BS[own.row, own.column]].nonzero().squeeze(1)
    return BranchTokens(
        position=local.position,
        own_place=own.place,
        own_image=own.image,
        masked=branch.masked_N[local.source].nonzero().squeeze(1),
        own_masked=own_masked,
        own_masked_image=own.image[own_masked],
    )
