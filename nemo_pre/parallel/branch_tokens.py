"""The visual tokens of LaVer's branch on one rank, and whole images brought together for the Gram term.

Sequence and context parallelism cut images apart; a Gram matrix needs all tokens of an image. Every rank predicts the
tokens it has, the predictions are gathered, and each rank compares its share of the images (image i goes to rank
i modulo ranks), so that no entry is counted twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.parallel.gather import gather_first_dimension
from nemo_pre.parallel.sequence_layout import local_positions, local_visual_tokens
from nemo_pre.parallel.token_streams import StreamShape, VisualBranch, gathered_order


@dataclass(frozen=True)
class BranchTokens:
    """Index tensors; all but ``own_image`` lie on the device.

    Attributes:
        position: ``[n]`` place of this rank's visual tokens in ``hidden_states.reshape(L * B, d)``.
        masked: ``[m]`` which of these are masked, as indices into ``position``.
        own_place: ``[k]`` place, in the gathered ``[ranks * L * B, d]``, of all tokens of the images that this rank
            compares, image by image.
        own_image: ``[k]`` image of each, on the CPU.
        own_masked: ``[j]`` which of these are masked, as indices into ``own_place``.
    """

    position: Tensor
    masked: Tensor
    own_place: Tensor
    own_image: Tensor
    own_masked: Tensor

    def to(self, device: torch.device | str | int) -> BranchTokens:
        return BranchTokens(
            *(
                getattr(self, f.name) if f.name == "own_image" else getattr(self, f.name).to(device, non_blocking=True)
                for f in fields(self)
            )
        )


def branch_tokens(branch: VisualBranch, shape: StreamShape, tp_rank: int) -> BranchTokens:
    """Worked out on the CPU, on every rank for itself.

    Args:
        tp_rank: this rank's place in sequence parallelism, 0 without it.
    """
    layout = branch.layout
    batch, length = layout.visual_source_BS.shape
    here_L = local_positions(length, shape.tp_size, tp_rank, shape.cp_size, shape.cp_rank)
    local = local_visual_tokens(layout, here_L)
    ranks, rank = shape.tp_size * shape.cp_size, shape.cp_rank * shape.tp_size + tp_rank

    place_S = torch.empty(length, dtype=torch.int64)
    place_S[gathered_order([length], shape.tp_size, shape.cp_size)] = torch.arange(length)
    owner_BS = torch.zeros_like(layout.visual_image_BS) if branch.images_together else layout.visual_image_BS % ranks
    row, position = torch.where((layout.visual_image_BS >= 0) & (owner_BS == rank))
    image = layout.visual_image_BS[row, position]
    by_image = image.argsort(stable=True)
    row, position, image = row[by_image], position[by_image], image[by_image]
    return BranchTokens(
        position=local.position,
        masked=branch.masked_N[local.source].nonzero().squeeze(1),
        own_place=place_S[position] * batch + row,
        own_image=image,
        own_masked=branch.masked_N[layout.visual_source_BS[row, position]].nonzero().squeeze(1),
    )


def whole_images(
    predictions: Tensor, tokens: BranchTokens, num_places: int, groups: Sequence[dist.ProcessGroup]
) -> Tensor:
    """Predictions ``[k, d]`` of all tokens of the images this rank compares, from everyone's ``[n, d]``.

    Args:
        num_places: L * B, the same on every rank.
        groups: what the branch is cut over: sequence parallelism's, then context parallelism's; only those of
            more than one rank.
    """
    gathered = predictions.new_zeros(num_places, predictions.shape[1]).index_copy(0, tokens.position, predictions)
    for group in groups:
        gathered = gather_first_dimension(gathered, group)
    return gathered[tokens.own_place]


def mean_pairwise_cosine_terms(tokens_kd: Tensor, image_k: Tensor) -> tuple[Tensor, int]:
    """Sum over images of the cosines between different tokens of an image, and the number of such pairs (ordered).

    Linear in the tokens: the cosines of all pairs sum to the squared length of the sum of unit vectors.
    """
    sizes = image_k.unique(return_counts=True)[1] if len(image_k) else image_k
    pairs = int((sizes * (sizes - 1)).sum())
    if not pairs:
        return tokens_kd.new_zeros((), dtype=torch.float32), 0
    unit = torch.nn.functional.normalize(tokens_kd.float(), dim=-1)
    sums = unit.new_zeros(int(image_k.max()) + 1, unit.shape[1]).index_add(0, image_k.to(unit.device), unit)
    return sums.pow(2).sum() - len(image_k), pairs
