"""Reads a step's micro-batches ahead, so that global counts are known before the first backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from nemo_pre.objectives.scale import IMAGES, LOSS_TOKENS, VISUAL_TOKENS, StepPlan
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.parallel.micro_batch import MicroBatch
from nemo_pre.parallel.sequence_layout import (
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
    SequenceLayout,
    combined_lengths,
    expand_labels,
    sequence_layout,
)
from nemo_pre.terms.term import Term, Weight

if TYPE_CHECKING:
    from nemo_pre.parallel.token_streams import VisualBranch
    from nemo_pre.terms.training import Training

LANGUAGE_MODEL = "lm"  # the name of the language model's own term


class StepPlanner:
    """Lays out a step's micro-batches, counts what losses are divided by, globally, and fixes the terms' weights.

    One all-reduce of a few integers over the data-parallel group per step; on a GPU it runs on the CPU group, so no
    kernel waits for it.

    Args:
        lm_weight: weight of the language model's loss.

    Attributes:
        weights: of each loss term; objectives' terms add theirs (:meth:`add`).
    """

    def __init__(self, lm_weight: float = 1.0) -> None:
        self.weights: dict[str, Weight] = {LANGUAGE_MODEL: Weight(lm_weight, ScheduleConfig())}
        self._owners: dict[str, object] = {LANGUAGE_MODEL: self}
        self._terms: list[Term] = []

    def add(self, term: Term) -> None:
        """Let every step's plan have the term's weights and counts; a second call for the same term changes nothing.

        Raises:
            ValueError: another objective's loss term has this name.
        """
        for name, weight in term.weights().items():
            if self._owners.setdefault(name, term) is not term:
                raise ValueError(f"Two objectives have a loss term '{name}': give each a name of its own.")
            self.weights[name] = weight
        if term not in self._terms:
            self._terms.append(term)

    def plan(self, training: Training, batches: Sequence[dict[str, Any]]) -> tuple[StepPlan, int]:
        """Put a planned :class:`MicroBatch` into each of the step's batches (``batch["micro_batch"]``).

        Args:
            batches: the step's micro-batches on this rank, in NeVA's raw format.

        Returns:
            The plan, and the length of what travels between pipeline stages: the samples, and where there is one the
            student's and the teacher's branch.
        """
        chunk = training.chunks[0]
        tiles = [chunk.image_tiles(batch["num_media_tiles"] or [], batch.get("media_grids")) for batch in batches]
        lengths = [
            combined_lengths(batch["tokens"], tiles_of, IMAGE_TOKEN_INDEX)
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        # The longest of this rank's micro-batches: pipeline stages must exchange one shape, but not the maximum's.
        sequence_length = chunk.padded_length(int(torch.cat(lengths).max()))
        layouts = [
            sequence_layout(batch["tokens"], tiles_of, IMAGE_TOKEN_INDEX, sequence_length, batch.get("segments"))
            for batch, tiles_of in zip(batches, tiles, strict=True)
        ]
        branches = self._branches(training, batches, layouts)
        plan = StepPlan(
            num_microbatches=len(batches),
            sequence_length=sequence_length,
            counts=sum_over_data_parallel(self._counts(batches, layouts, branches)),
            weights={name: weight.at(training.steps_done) for name, weight in self.weights.items()},
        )
        for index, (batch, layout, branch) in enumerate(zip(batches, layouts, branches, strict=True)):
            batch["micro_batch"] = MicroBatch(index, plan, layout, branch)
        branch_length = 0 if branches[0] is None else branches[0].layout.sequence_length
        return plan, sequence_length + 2 * branch_length

    def _branches(
        self, training: Training, batches: Sequence[dict[str, Any]], layouts: Sequence[SequenceLayout]
    ) -> list[VisualBranch | None]:
        planned = [
            branches
            for term in self._terms
            if (branches := term.plan_branches(training, batches, layouts)) is not None
        ]
        if len(planned) > 1:
            raise ValueError("Two objectives run a sequence of their own beside the samples: enable one of them.")
        return list(planned[0]) if planned else [None] * len(batches)

    def _counts(
        self,
        batches: Sequence[dict[str, Any]],
        layouts: Sequence[SequenceLayout],
        branches: Sequence[VisualBranch | None],
    ) -> dict[str, int]:
        """What this replica's micro-batches have to be averaged over.

        Raises:
            ValueError: two terms count something of one name.
        """
        found = {LOSS_TOKENS: 0, VISUAL_TOKENS: 0, IMAGES: 0}
        for batch, layout in zip(batches, layouts, strict=True):
            loss_mask = expand_labels(layout, batch["labels"], batch["loss_mask"], IGNORE_INDEX)[1]
            found[LOSS_TOKENS] += int(loss_mask.sum())
            found[VISUAL_TOKENS] += layout.num_visual_tokens
            found[IMAGES] += layout.num_images
        for term in self._terms:
            own: dict[str, int] = {}  # with those that are 0: ranks must agree on the names
            for layout, branch in zip(layouts, branches, strict=True):
                for name, count in term.counts(layout, branch).items():
                    own[name] = own.get(name, 0) + count
            if twice := own.keys() & found.keys():
                raise ValueError(f"Two terms count '{min(twice)}': give each count a name of its own.")
            found |= own
        return found


def sum_over_data_parallel(counts: dict[str, int]) -> dict[str, int]:
    """The sums over data-parallel ranks. Context-parallel ranks count the same whole samples, so they stay out."""
    from megatron.core import parallel_state as ps

    total = torch.tensor(list(counts.values()), dtype=torch.int64)
    if ps.get_data_parallel_world_size() > 1:
        dist.all_reduce(total, group=ps.get_data_parallel_group_gloo())
    return dict(zip(counts, total.tolist(), strict=True))
