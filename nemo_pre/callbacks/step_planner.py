"""Reads a step's micro-batches ahead, so that global counts are known before the first backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.objective import StepPlan


class StepPlanner(Callback):
    """Lays out a step's micro-batches and counts its loss tokens, visual tokens and images globally.

    One all-reduce of three integers over the data-parallel group per step; on a GPU it runs on the CPU group, so
    no kernel waits for it. The micro-batches of a step are held in host memory until they have run.
    """

    def on_megatron_microbatches_start(self, step: Any) -> None:
        from nemo.collections.vlm.neva.data.multimodal_tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX

        from nemo_pre.neva.micro_batch import MicroBatch, raw_batch
        from nemo_pre.neva.model import model_chunks
        from nemo_pre.parallel.sequence_layout import combined_lengths, expand_labels, sequence_layout

        chunk = model_chunks(step.trainer)[0]
        items = [next(step.data) for _ in range(step.num_microbatches)]
        batches = [raw_batch(item) for item in items]
        tiles = [batch["num_media_tiles"] or [] for batch in batches]
        lengths = [
            combined_lengths(batch["tokens"], tiles_of, chunk.tile_tokens, IMAGE_TOKEN_INDEX)
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        # The longest of this rank's micro-batches: pipeline stages must exchange one shape, but not the maximum's.
        sequence_length = chunk.padded_length(int(torch.cat(lengths).max()))
        layouts = [
            sequence_layout(batch["tokens"], tiles_of, chunk.tile_tokens, IMAGE_TOKEN_INDEX, sequence_length)
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        loss_tokens = sum(
            int(expand_labels(layout, batch["labels"], batch["loss_mask"], IGNORE_INDEX)[1].sum())
            for layout, batch in zip(layouts, batches, strict=True)
        )
        loss_tokens, visual_tokens, images = sum_over_data_parallel(
            [
                loss_tokens,
                sum(layout.num_visual_tokens for layout in layouts),
                sum(layout.num_images for layout in layouts),
            ]
        )
        plan = StepPlan(len(items), sequence_length, loss_tokens, visual_tokens, images)
        for index, (batch, layout) in enumerate(zip(batches, layouts, strict=True)):
            batch["micro_batch"] = MicroBatch(index, plan, layout)
        step.data = iter(items)
        step.seq_length = sequence_length


def sum_over_data_parallel(counts: list[int]) -> list[int]:
    """Sum over data-parallel ranks. Context-parallel ranks count the same whole samples, so they stay out."""
    from megatron.core import parallel_state as ps

    total = torch.tensor(counts, dtype=torch.int64)
    if ps.get_data_parallel_world_size() > 1:
        dist.all_reduce(total, group=ps.get_data_parallel_group_gloo())
    return total.tolist()
