"""LaVer on the ranks: plans the masked branch, computes its losses, injects their gradient, moves the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_pre.losses import gram_anchoring_loss, masked_prediction_loss
from nemo_pre.losses.pairwise_cosine import pair_cosines_within_images
from nemo_pre.objectives.laver import NAME, LaVerConfig
from nemo_pre.objectives.laver.head import ReconstructionHeadSpec, ReconstructionSpec
from nemo_pre.objectives.laver.masks import visual_token_masks
from nemo_pre.objectives.laver.schedules import mask_ratio, teacher_momentum, update_interval, updates_teacher
from nemo_pre.objectives.scale import StepPlan, global_mean, term_scale
from nemo_pre.parallel.auxiliary_gradient import backpropagate_with
from nemo_pre.parallel.image_tokens import whole_images
from nemo_pre.parallel.micro_batch import BranchStates, MicroBatch
from nemo_pre.parallel.sequence_cut import counts_local_tokens, sequence_shard_groups
from nemo_pre.parallel.sequence_layout import IMAGE_TOKEN_INDEX, SequenceLayout
from nemo_pre.parallel.token_streams import VisualBranch, image_rows, image_sizes, packed_images, packed_length
from nemo_pre.terms.term import Term, Weight
from nemo_pre.terms.training import Training, VisualModelConfig

SUMS = ("mim", "gram", "similarity", "entropy")  # what a step adds up, over micro-batches and ranks
# Counts of the global batch; pairs are of different tokens of an image.
MASKED_TOKENS, GRAM_ENTRIES, PAIRS, IMAGES = "masked_tokens", "gram_entries", "laver_pairs", "laver_images"


class LaVerTerm(Term):
    """LaVer's terms, in a model with mixed attention.

    Args:
        options: see :class:`nemo_pre.objectives.laver.LaVerConfig`.
        seed: of the masks and of the initial weights of mask token and head.

    Raises:
        ValueError: an option has a value that it cannot have; from :meth:`prepare`, the model has causal attention.
    """

    name = NAME

    def __init__(self, options: LaVerConfig, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._chunks: list[Any] = []  # VisualChunk, with what ReconstructionSpec gives it
        self._sums: dict[int, Tensor] = {}
        self._center_sums: dict[int, Tensor] = {}
        self._mask_ratio = 0.0
        self._momentum: float | None = None  # of the teacher's move behind the step at hand; None: it stays

    # --- installation -------------------------------------------------------------------------------------------

    def weights(self) -> Mapping[str, Weight]:
        return {
            "mim": Weight(self.options.mim_weight, self.options.mim_schedule),
            "gram": Weight(self.options.gram_weight, self.options.gram_schedule),
        }

    def prepare(self, model: VisualModelConfig) -> None:
        if not model.mixed_attention:
            raise ValueError("objective.laver needs attention that keeps images apart: set model.attention=mixed.")
        model.branch = True
        model.parts[NAME] = self.spec(model)

    def spec(self, model: VisualModelConfig) -> ReconstructionSpec:
        """What this objective adds to a model."""
        language = model.language_transformer_config
        return ReconstructionSpec(
            head=ReconstructionHeadSpec(language.hidden_size, self.options.head_hidden_width, self.seed),
            mask_token_id=self.options.mask_token_id if self.options.mask_token == "embedding" else None,
            mask_token_std=language.init_method_std,
            teacher_memory=self.options.teacher_memory,
        )

    def install(self, training: Training) -> None:
        from megatron.core import parallel_state as ps

        self._chunks = list(training.chunks)
        self._model = self._chunks[0].config
        self._interval = update_interval(self.options.update_every, self.options.update_fraction, training.max_steps)
        replicas = ps.get_data_parallel_group(with_context_parallel=True)
        for chunk in self._chunks:
            chunk.laver_teacher.install(chunk.language_model, getattr(chunk, "laver_head", None), replicas)
            if chunk.post_process:
                chunk.on_branch.append(self._visit)
        self._counts_here = counts_local_tokens(self._model.sequence_parallel)
        self._image_groups = sequence_shard_groups(self._model.sequence_parallel)

    def finish(self) -> None:
        for chunk in self._chunks:
            chunk.laver_teacher.wait()

    def remove(self) -> None:
        for chunk in self._chunks:
            chunk.on_branch = [listener for listener in chunk.on_branch if listener != self._visit]
        self._chunks = []

    # --- planning a step ------------------------------------------------------------------------------------------

    def plan_branches(
        self, training: Training, batches: Sequence[dict[str, Any]], layouts: Sequence[SequenceLayout]
    ) -> list[VisualBranch]:
        """Which visual tokens are masked, and where each micro-batch's branch has them."""
        from megatron.core import parallel_state as ps

        done, chunk = training.steps_done, training.chunks[0]
        self._momentum = self._momentum_after(done + 1, training.max_steps)
        self._mask_ratio = mask_ratio(self.options.mask_schedule, done, training.max_steps, self.options.mask_ratio)
        masks = []
        for index, (batch, layout) in enumerate(zip(batches, layouts, strict=True)):
            place = index * ps.get_data_parallel_world_size() + ps.get_data_parallel_rank()
            masks.append(
                visual_token_masks(
                    (batch["tokens"] == IMAGE_TOKEN_INDEX).sum(1).tolist(),
                    layout.tokens_per_image,
                    self._mask_ratio,
                    self.options.mask_sampling,
                    self.seed,
                    done,
                    first_sample=place * len(batch["tokens"]),
                )
            )
        together = self.options.gram_scope == "micro_batch"
        if self.options.sequence == "whole":
            branch_layouts = list(layouts)
        else:
            rows = [image_rows(layout) for layout in layouts]
            longest = max(packed_length(layout, row) for layout, row in zip(layouts, rows, strict=True))
            length = chunk.sharded_length(longest)
            branch_layouts = [packed_images(layout, row, length) for layout, row in zip(layouts, rows, strict=True)]
        return [
            VisualBranch(layout, mask, self.options.sequence == "images", together)
            for layout, mask in zip(branch_layouts, masks, strict=True)
        ]

    def counts(self, layout: SequenceLayout, branch: VisualBranch | None) -> Mapping[str, int]:
        assert branch is not None
        sizes = image_sizes(branch.layout).values()
        pairs = sum(size * (size - 1) for size in sizes)
        return {
            MASKED_TOKENS: branch.num_masked,
            GRAM_ENTRIES: self._gram_entries(branch),
            PAIRS: pairs,
            IMAGES: len(sizes),
        }

    def _gram_entries(self, branch: VisualBranch) -> int:
        """Entries of the Gram matrices that are compared."""
        images_BS = branch.layout.visual_image_BS
        if self.options.gram_positions == "masked":
            images_BS = images_BS.masked_fill(~branch.masked_BS, -1)
        sizes = image_sizes(replace(branch.layout, visual_image_BS=images_BS)).values()
        return sum(sizes) ** 2 if branch.images_together else sum(size**2 for size in sizes)

    # --- one step -----------------------------------------------------------------------------------------------

    def start_step(self) -> None:
        self._sums, self._center_sums = {}, {}

    def forget_step(self) -> None:
        self.start_step()

    def _visit(self, chunk: Any, micro_batch: MicroBatch, states: BranchStates, output: Tensor) -> Tensor:
        """Compare, on the last stage, what student and teacher make of the branch, and inject the gradient."""
        tokens, options = micro_batch.branch_tokens, self.options
        assert tokens is not None
        student = chunk.laver_head(states.student[tokens.position])
        teacher = chunk.laver_teacher.predict(states.teacher[tokens.position])
        center = chunk.laver_teacher.center if options.centring else None
        mim_sum, _ = masked_prediction_loss(
            student[tokens.masked],
            teacher[tokens.masked],
            options.student_temperature,
            options.teacher_temperature,
            center,
        )
        places = states.student.shape[0]
        whole_student = whole_images(student, tokens, places, self._image_groups)
        gram_sum = self._gram(micro_batch, whole_student, whole_images(teacher, tokens, places, self._image_groups))

        with torch.no_grad():
            similarity, _ = pair_cosines_within_images(whole_student.detach(), tokens.own_image)
            entropy = _entropy(teacher[tokens.masked], center, options.teacher_temperature)
            sums = (mim_sum * self._share(micro_batch), gram_sum, similarity, entropy)
            self._sums[micro_batch.index] = torch.stack([value.detach().double() for value in sums])
            if options.centring:
                self._center_sums[micro_batch.index] = teacher.float().sum(0)
        if not torch.is_grad_enabled():
            return output
        mim_scale = self._scale("mim", micro_batch) * self._share(micro_batch)
        return backpropagate_with(output, mim_sum * mim_scale + gram_sum * self._scale("gram", micro_batch))

    def _gram(self, micro_batch: MicroBatch, student: Tensor, teacher: Tensor) -> Tensor:
        """The Gram term of the images this rank compares, from all their tokens ``[k, d]``."""
        tokens, branch = micro_batch.branch_tokens, micro_batch.branch
        assert tokens is not None and branch is not None
        image = tokens.own_image
        if self.options.gram_positions == "masked":
            student, teacher = student[tokens.own_masked], teacher[tokens.own_masked]
            image = tokens.own_masked_image
        if branch.images_together:
            image = torch.zeros_like(image)
        return gram_anchoring_loss(student, teacher, image, self.options.gram_clipped)[0]

    def _share(self, micro_batch: MicroBatch) -> float:
        """What a masked token's loss weighs in L_MIM beside the division by :meth:`_count`."""
        if self.options.mim_reduction != "micro_batch":
            return 1.0
        assert micro_batch.branch is not None
        return 1.0 / max(micro_batch.branch.num_masked, 1)

    def _count(self, term: str, plan: StepPlan) -> int:
        from megatron.core import parallel_state as ps

        reduction = self.options.gram_reduction if term == "gram" else self.options.mim_reduction
        if reduction == "image":
            return plan.counts[IMAGES]
        if term == "gram":
            return plan.counts[GRAM_ENTRIES]
        if reduction == "global":
            return plan.counts[MASKED_TOKENS]
        return plan.num_microbatches * ps.get_data_parallel_world_size()

    def _scale(self, term: str, micro_batch: MicroBatch) -> float:
        plan = micro_batch.plan
        return term_scale(plan, term, self._count(term, plan), self._model)

    # --- after the step -----------------------------------------------------------------------------------------

    def end_step(self, plan: StepPlan) -> Mapping[str, Tensor | float]:
        """The global values on every rank, without those that a batch without an image or a masked token lacks; moves
        the centre."""
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=torch.cuda.current_device())
        if self._sums and self._counts_here:
            sums += torch.stack(list(self._sums.values())).sum(0)
        dist.all_reduce(sums)
        mim, gram, similarity, entropy = sums
        self._move_center(plan)
        found: dict[str, Tensor | float] = {
            "laver/mask_ratio": self._mask_ratio,
            "laver/mim_weight": plan.weights["mim"],
            "laver/gram_weight": plan.weights["gram"],
        }
        if masked := plan.counts[MASKED_TOKENS]:
            found["laver/mim"] = global_mean(mim, self._count("mim", plan))
            found["laver/teacher_entropy"] = global_mean(entropy, masked)
        if plan.counts[GRAM_ENTRIES]:
            found["laver/gram"] = global_mean(gram, self._count("gram", plan))
        if pairs := plan.counts[PAIRS]:
            found["laver/similarity"] = similarity / pairs
        if self._momentum is not None:
            found["laver/momentum"] = self._momentum
        return found

    @torch.no_grad()
    def _move_center(self, plan: StepPlan) -> None:
        """Once a step: towards the mean of the teacher's logits over all visual tokens of the global batch."""
        from megatron.core import parallel_state as ps

        if not self.options.centring or plan.visual_tokens == 0:
            return
        for chunk in self._chunks:
            if chunk.post_process:
                center = chunk.laver_teacher.center
                assert center is not None
                total = torch.stack(list(self._center_sums.values())).sum(0)
                dist.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
                if self._model.sequence_parallel:
                    dist.all_reduce(total, group=ps.get_tensor_model_parallel_group())
                center.lerp_(total / plan.visual_tokens, 1.0 - self.options.center_momentum)

    def after_update(self, training: Training) -> None:
        """Move the teacher."""
        momentum = self._momentum_after(training.steps_done, training.max_steps)
        if momentum is not None:
            for chunk in self._chunks:
                chunk.laver_teacher.update(momentum)

    def _momentum_after(self, step: int, max_steps: int) -> float | None:
        """Momentum with which the teacher moves after optimizer step number ``step`` (1-based); None: it does not."""
        if not updates_teacher(step, self._interval):
            return None
        return teacher_momentum(self.options.momentum_schedule, step, max_steps, self.options.momentum)


def _entropy(logits: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """Sum over tokens of the entropy, in nats, of what L_MIM takes as target."""
    log_p = ((logits.float() - (0.0 if center is None else center)) / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum()
