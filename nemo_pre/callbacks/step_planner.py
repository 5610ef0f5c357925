"""Reads a step's micro-batches ahead, so that global counts are known before the first backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback

from nemo_pre.config.schema import ScheduleConfig
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.objectives.schedules import ramp

if TYPE_CHECKING:
    from nemo_pre.parallel.sequence_layout import SequenceLayout
    from nemo_pre.parallel.token_streams import VisualBranch

Weight = Callable[[int], float]  # of a loss term, from the optimizer steps done


class BranchPlanner:
    """What an objective that runs a second sequence beside the samples tells the planner."""

    def plan_branches(
        self, step: Any, batches: list[dict[str, Any]], layouts: list[SequenceLayout]
    ) -> list[VisualBranch]:
        """A branch for every micro-batch, all of one length."""
        raise NotImplementedError

    def gram_entries(self, branch: VisualBranch) -> int:
        """What the branch's Gram term is averaged over."""
        raise NotImplementedError


class StepPlanner(Callback):
    """Lays out a step's micro-batches, counts what losses are divided by, globally, and fixes the terms' weights.

    One all-reduce of five integers over the data-parallel group per step; on a GPU it runs on the CPU group, so
    no kernel waits for it. The micro-batches of a step are held in host memory until they have run.

    Attributes:
        terms: weight of each loss term over the optimizer steps; objectives add theirs (:meth:`add_term`).
        branch_planner: lays a second sequence out beside the samples; None without one.
        items: the step's micro-batches as the loader gave them, planned.
    """

    def __init__(self, lm_weight: float = 1.0) -> None:
        self.terms: dict[str, Weight] = {"lm": lambda _: lm_weight}
        self._objectives: dict[str, object] = {"lm": self}
        self.branch_planner: BranchPlanner | None = None
        self.items: list[Any] = []

    def add_term(self, objective: object, name: str, weight: float, schedule: ScheduleConfig) -> None:
        """Let every step's plan have ``weights[name]``, the schedule applied.

        Raises:
            ValueError: another objective's term has this name.
        """
        if self._objectives.setdefault(name, objective) is not objective:
            raise ValueError(f"Two objectives have a loss term '{name}': give each a name of its own.")
        self.terms[name] = lambda step: weight * ramp(schedule.kind, step, schedule.start, schedule.steps)

    def on_megatron_microbatches_start(self, step: Any) -> None:
        """Plan the step.

        Raises:
            ValueError: it is one of Lightning's validation.
        """
        if step.forward_only:
            raise ValueError(
                "Lightning's validation is not planned, and its values would be recorded as training's: set "
                "limit_val_batches=0 and validate with nemo_pre.callbacks.exact_match."
            )
        from nemo.collections.vlm.neva.data.multimodal_tokens import IGNORE_INDEX, IMAGE_TOKEN_INDEX

        from nemo_pre.neva.micro_batch import MicroBatch, raw_batch
        from nemo_pre.neva.model import model_chunks
        from nemo_pre.parallel.sequence_layout import combined_lengths, expand_labels, sequence_layout

        chunk = model_chunks(step.trainer)[0]
        self.items = items = [next(step.data) for _ in range(step.num_microbatches)]
        batches = [raw_batch(item) for item in items]
        tiles = [chunk.image_tiles(batch["num_media_tiles"] or [], batch.get("media_grids")) for batch in batches]
        lengths = [
            combined_lengths(batch["tokens"], tiles_of, IMAGE_TOKEN_INDEX)
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        # The longest of this rank's micro-batches: pipeline stages must exchange one shape, but not the maximum's.
        sequence_length = chunk.padded_length(int(torch.cat(lengths).max()))
        layouts = [
            sequence_layout(
                batch["tokens"],
                tiles_of,
                IMAGE_TOKEN_INDEX,
                sequence_length,
                batch.get("segments"),
            )
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        branches: list[VisualBranch | None] = [None] * len(items)
        masked_tokens = gram_entries = branch_length = 0
        if self.branch_planner is not None:
            planned = self.branch_planner.plan_branches(step, batches, layouts)
            masked_tokens = sum(branch.num_masked for branch in planned)
            gram_entries = sum(self.branch_planner.gram_entries(branch) for branch in planned)
            branch_length = planned[0].layout.sequence_length
            branches = list(planned)
        loss_tokens = sum(
            int(expand_labels(layout, batch["labels"], batch["loss_mask"], IGNORE_INDEX)[1].sum())
            for layout, batch in zip(layouts, batches, strict=True)
        )
        loss_tokens, visual_tokens, images, masked_tokens, gram_entries = sum_over_data_parallel(
            [
                loss_tokens,
                sum(layout.num_visual_tokens for layout in layouts),
                sum(layout.num_images for layout in layouts),
                masked_tokens,
                gram_entries,
            ]
        )
        weights = {name: weight(step.trainer.global_step) for name, weight in self.terms.items()}
        plan = StepPlan(
            len(items), sequence_length, loss_tokens, visual_tokens, images, masked_tokens, gram_entries, weights
        )
        for index, (batch, layout, branch) in enumerate(zip(batches, layouts, branches, strict=True)):
            batch["micro_batch"] = MicroBatch(index, plan, layout, branch)
        step.data = iter(items)
        # Between stages travel the samples, the student's branch and the teacher's.
        step.seq_length = sequence_length + 2 * branch_length


def step_planner(trainer: Any) -> StepPlanner:
    """The trainer's planner; one is added where none is."""
    for callback in trainer.callbacks:
        if isinstance(callback, StepPlanner):
            return callback
    trainer.callbacks.append(StepPlanner())
    return trainer.callbacks[-1]


def sum_over_data_parallel(counts: list[int]) -> list[int]:
    """Sum over data-parallel ranks. Context-parallel ranks count the same whole samples, so they stay out."""
    from megatron.core import parallel_state as ps

    total = torch.tensor(counts, dtype=torch.int64)
    if ps.get_data_parallel_world_size() > 1:
        dist.all_reduce(total, group=ps.get_data_parallel_group_gloo())
    return total.tolist()
