"""A micro-batch as every pipeline stage sees it: its place in the step, its layout and its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from nemo_pre.objective import StepPlan
from nemo_pre.parallel.sequence_layout import LocalVisualTokens, SequenceLayout, local_positions, local_visual_tokens


@dataclass(frozen=True)
class MicroBatch:
    """What a model chunk knows of the micro-batch it runs.

    Attributes:
        index: the micro-batch's number in the step; the same on every stage and virtual stage.
        plan: the step's global counts.
        layout: the combined sequence; on the CPU until :meth:`on_this_rank`.
        local: the visual tokens in this rank's shard of the sequence; set by :meth:`on_this_rank`.
    """

    index: int
    plan: StepPlan
    layout: SequenceLayout
    local: LocalVisualTokens | None = None

    def on_this_rank(self, sequence_parallel: bool) -> MicroBatch:
        """With the shard selected on the CPU, where it costs no synchronisation, and everything on the device."""
        import torch
        from megatron.core import parallel_state as ps

        positions_L = local_positions(
            self.layout.sequence_length,
            tp_size=ps.get_tensor_model_parallel_world_size() if sequence_parallel else 1,
            tp_rank=ps.get_tensor_model_parallel_rank() if sequence_parallel else 0,
            cp_size=ps.get_context_parallel_world_size(),
            cp_rank=ps.get_context_parallel_rank(),
        )
        local = local_visual_tokens(self.layout, positions_L)
        device = torch.cuda.current_device()
        moved = LocalVisualTokens(
            *(tensor.to(device, non_blocking=True) for tensor in (local.position, local.source, local.image))
        )
        return replace(self, layout=self.layout.to(device), local=moved)


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
    return {**tensors, "num_media_tiles": batch.get("num_media_tiles"), "micro_batch": batch.get("micro_batch")}
