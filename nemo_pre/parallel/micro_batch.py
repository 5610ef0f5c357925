"""A micro-batch as every pipeline stage sees it: its place in the step, its layout and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.branch_tokens import BranchTokens, branch_tokens
from nemo_pre.parallel.image_tokens import ImageTokens, image_tokens
from nemo_pre.parallel.sequence_layout import (
    CombinedPlaces,
    LocalVisualTokens,
    SequenceLayout,
    combined_places,
    local_positions,
    local_visual_tokens,
)
from nemo_pre.parallel.token_streams import DecoderStreams, StreamShape, VisualBranch, decoder_streams

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """What a model chunk knows of the micro-batch it runs.

    Attributes:
        index: the micro-batch's number in the step; the same on every stage and virtual stage.
        plan: the step's global counts and weights.
        layout: the combined sequence; on the CPU until :meth:`on_this_rank`.
        branch: the second sequence beside the samples, or None; stays on the CPU.
        pixels: on the first stage, of images whose features are read, where a loss looks at them.
        targets: on the first stage, by objective, features ``[num_tiles, tokens, width]`` of the images that are read
            instead of computed; empty where the micro-batch has no image.

    Set by :meth:`on_this_rank`:

    Attributes:
        local: the visual tokens in this rank's shard of the combined sequence.
        places, branch_places: on the first stage, where the samples' and the branch's tokens go.
        image_tokens: how images that ranks cut are brought together, where somebody asks for whole images.
        branch_tokens: the visual tokens of the branch, here and of the images this rank compares.
        streams: what the decoder is told of the tokens of both sequences; None for plain NeVA.
        teacher_streams: the same of the branch alone.
    """

    index: int
    plan: StepPlan
    layout: SequenceLayout
    branch: VisualBranch | None = None
    pixels: Tensor | None = None
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    local: LocalVisualTokens | None = None
    places: CombinedPlaces | None = None
    branch_places: CombinedPlaces | None = None
    image_tokens: ImageTokens | None = None
    branch_tokens: BranchTokens | None = None
    streams: DecoderStreams | None = None
    teacher_streams: DecoderStreams | None = None

    def on_this_rank(
        self, shape: StreamShape, tp_rank: int, plain: bool, first_stage: bool, whole_images: bool = False
    ) -> MicroBatch:
        """The micro-batch with everything worked out on the CPU, and moved to the device without a wait.

        Args:
            shape: how tokens attend and are cut.
            tp_rank: this rank's place in sequence parallelism, 0 without it.
            plain: the decoder works its own causal mask and positions out.
            first_stage: embeddings are put together here.
            whole_images: work out how images that ranks cut are brought together.
        """
        import torch

        device = torch.cuda.current_device()

        positions_L = local_positions(
            self.layout.sequence_length, shape.tp_size, tp_rank, shape.cp_size, shape.cp_rank
        )
        local = local_visual_tokens(self.layout, positions_L)
        branch = self.branch
        return replace(
            self,
            layout=self.layout.to(device),
            local=local.to(device),
            places=combined_places(self.layout).to(device) if first_stage else None,
            branch_places=combined_places(branch.layout).to(device) if first_stage and branch else None,
            image_tokens=(
                image_tokens(self.layout, shape.tp_size, tp_rank, shape.cp_size, shape.cp_rank).to(device)
                if whole_images
                else None
            ),
            branch_tokens=branch_tokens(branch, shape, tp_rank).to(device) if branch else None,
            streams=None if plain else decoder_streams(self.layout, branch, shape).to(device),
            teacher_streams=decoder_streams(None, branch, shape).to(device) if branch else None,
        )


@dataclass
class VisualTokens:
    """The visual tokens of a micro-batch on the first stage, in the layout's numbering.

    Attributes:
        features: ``[n, d_vision]``, the encoder's, before the projector.
        tokens: ``[n, d]``, the projector's output: what enters the language model.
        images: ``[num_tiles, 3, H, W]``, as the data loader normalised them, with native resolution
            ``[n, patches, pixels]``; None where it read features alone.
        targets: by objective ``[n, width]``, what it compares them with where that is read instead of computed.
    """

    features: Tensor
    tokens: Tensor
    images: Tensor | None
    targets: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class BranchStates:
    """The branch's final hidden states on the last stage, after the final norm, ``[L * B, d]`` of this rank's shard.

    Attributes:
        student: of the masked branch, with a graph.
        teacher: of the unmasked branch through the teacher.
    """

    student: Tensor
    teacher: Tensor


def raw_batch(item: Any) -> dict[str, Any]:
    """The batch of a loader item, which Lightning may have wrapped as ``(batch, batch_idx, dataloader_idx)``."""
    return item[0] if isinstance(item, tuple) and len(item) == 3 else item


def load_micro_batch(dataloader_iter: Iterator[Any], first_stage: bool, last_stage: bool) -> dict[str, Any]:
    """Next micro-batch with, on the device, only what this (virtual) pipeline stage reads.

    NeVA's own step moves the images to every stage.
    """
    batch = raw_batch(next(dataloader_iter))
    needed = {"tokens"}
    if first_stage:
        needed |= {"media", "position_ids"}
    if last_stage:
        needed |= {"labels", "loss_mask"}
    tensors = {
        key: batch[key].cuda(non_blocking=True) if key in needed and batch.get(key) is not None else None
        for key in ("tokens", "media", "position_ids", "labels", "loss_mask")
    }
    micro_batch = batch.get("micro_batch")
    if first_stage and micro_batch is not None and batch.get("pixels") is not None:
        micro_batch = replace(micro_batch, pixels=batch["pixels"].cuda(non_blocking=True))
    if first_stage and micro_batch is not None and batch.get("targets"):
        targets = {name: features.cuda(non_blocking=True) for name, features in batch["targets"].items()}
        micro_batch = replace(micro_batch, targets=targets)
    images = {key: batch.get(key) for key in ("num_media_tiles", "media_grids")}
    return {**tensors, **images, "micro_batch": micro_batch}


def forward_arguments(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a chunk's forward pass takes, out of what :func:`load_micro_batch` gives."""
    names = {
        "input_ids": "tokens",
        "position_ids": "position_ids",
        "images": "media",
        "labels": "labels",
        "loss_mask": "loss_mask",
        "num_image_tiles": "num_media_tiles",
        "image_grids": "media_grids",
        "micro_batch": "micro_batch",
    }
    return {argument: batch[key] for argument, key in names.items()}
