"""LaVer as a callback: plans the masked branch, computes its losses, injects their gradient, moves the teacher.

Latent Visual Reconstruction (arXiv 2512.06281): masked visual tokens are recovered in the language model's latent
space against a moving-average teacher that saw them all (L_MIM), and the student's visual tokens may not become more
alike than the teacher's (L_CGA, clipped Gram-anchoring).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nemo_pre.callbacks.step_planner import BranchPlanner, step_planner
from nemo_pre.config.schema import LaVerConfig
from nemo_pre.losses import gram_anchoring_loss, masked_prediction_loss
from nemo_pre.neva.heads import ReconstructionHeadSpec
from nemo_pre.neva.micro_batch import MicroBatch
from nemo_pre.neva.model import (
    IMAGE_TOKEN_INDEX,
    BranchStates,
    MCoreVisualNevaModel,
    ReconstructionSpec,
    VisualNevaConfig,
    model_chunks,
)
from nemo_pre.objectives.scale import StepPlan, global_mean, term_scale
from nemo_pre.objectives.schedules import mask_ratio, teacher_momentum, update_interval, updates_teacher
from nemo_pre.parallel.auxiliary_gradient import backpropagate_with
from nemo_pre.parallel.branch_tokens import mean_pairwise_cosine_terms
from nemo_pre.parallel.image_tokens import whole_images
from nemo_pre.parallel.masking import visual_token_masks
from nemo_pre.parallel.sequence_cut import groups_that_cut, reports_its_tokens
from nemo_pre.parallel.sequence_layout import SequenceLayout
from nemo_pre.parallel.token_streams import VisualBranch, image_rows, image_sizes, packed_images, packed_length

log = logging.getLogger(__name__)

SUMS = ("mim", "gram", "similarity", "pairs", "entropy")  # what a step adds up, over micro-batches and ranks


class LaVerCallback(Callback, BranchPlanner):
    """Adds LaVer to a NeVA run whose model has mixed attention.

    Args:
        config: see :class:`nemo_pre.config.schema.LaVerConfig`.
        seed: of the masks and of the initial weights of mask token and head.

    Raises:
        ValueError: at setup, where the model has causal attention.
    """

    def __init__(self, config: LaVerConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._chunks: list[MCoreVisualNevaModel] = []
        self._sums: dict[int, Tensor] = {}
        self._center_sums: dict[int, Tensor] = {}
        self._plan: StepPlan | None = None
        self._mask_ratio = 0.0
        self._momentum: float | None = None

    # --- installation -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is built: ask it for mask token, head and teacher, and the planner for a branch."""
        neva = pl_module.config
        neva.laver = self.spec(neva)
        planner = step_planner(trainer)
        planner.add_term(self, "mim", self.config.mim_weight, self.config.mim_schedule)
        planner.add_term(self, "gram", self.config.gram_weight, self.config.gram_schedule)
        planner.branch_planner = self

    def spec(self, neva: VisualNevaConfig) -> ReconstructionSpec:
        """What this objective adds to a model."""
        width = neva.language_transformer_config.hidden_size
        return ReconstructionSpec(
            head=ReconstructionHeadSpec(width, self.config.head_hidden_width, self.seed),
            mask_token_id=self.config.mask_token_id if self.config.mask_token == "embedding" else None,
            teacher_memory=self.config.teacher_memory,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from megatron.core import parallel_state as ps

        self._chunks = model_chunks(trainer)
        self._neva = self._chunks[0].config
        self._interval = update_interval(self.config.update_every, self.config.update_fraction, trainer.max_steps)
        replicas = ps.get_data_parallel_group(with_context_parallel=True)
        for chunk in self._chunks:
            chunk.laver_teacher.install(chunk.language_model, getattr(chunk, "laver_head", None), replicas)
            if chunk.post_process:
                chunk.on_branch.append(self._visit)
        self._counts_here = reports_its_tokens(self._neva.sequence_parallel)
        self._cut_over = groups_that_cut(self._neva.sequence_parallel)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for chunk in self._chunks:
            chunk.laver_teacher.wait()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for chunk in self._chunks:
            chunk.on_branch = [listener for listener in chunk.on_branch if listener != self._visit]
        self._chunks = []

    # --- planning a step ------------------------------------------------------------------------------------------

    def plan_branches(
        self, step: Any, batches: list[dict[str, Any]], layouts: list[SequenceLayout]
    ) -> list[VisualBranch]:
        """Which visual tokens are masked, and where each micro-batch's branch has them."""
        from megatron.core import parallel_state as ps

        done, chunk = step.trainer.global_step, model_chunks(step.trainer)[0]
        self._mask_ratio = mask_ratio(self.config.mask_schedule, done, step.trainer.max_steps, self.config.mask_ratio)
        masks = []
        for index, (batch, layout) in enumerate(zip(batches, layouts, strict=True)):
            place = index * ps.get_data_parallel_world_size() + ps.get_data_parallel_rank()
            masks.append(
                visual_token_masks(
                    (batch["tokens"] == IMAGE_TOKEN_INDEX).sum(1).tolist(),
                    layout.tokens_per_image,
                    self._mask_ratio,
                    self.config.mask_sampling,
                    self.seed,
                    done,
                    first_sample=place * len(batch["tokens"]),
                )
            )
        together = self.config.gram_scope == "micro_batch"
        if self.config.sequence == "whole":
            branch_layouts = layouts
        else:
            rows = [image_rows(layout) for layout in layouts]
            longest = max(packed_length(layout, row) for layout, row in zip(layouts, rows, strict=True))
            length = chunk.sharded_length(longest)
            branch_layouts = [packed_images(layout, row, length) for layout, row in zip(layouts, rows, strict=True)]
        return [
            VisualBranch(layout, mask, self.config.sequence == "images", together)
            for layout, mask in zip(branch_layouts, masks, strict=True)
        ]

    def gram_entries(self, branch: VisualBranch) -> int:
        images_BS = branch.layout.visual_image_BS
        if self.config.gram_positions == "masked":
            images_BS = images_BS.masked_fill(~branch.masked_BS, -1)
        sizes = image_sizes(replace(branch.layout, visual_image_BS=images_BS)).values()
        return sum(sizes) ** 2 if branch.images_together else sum(size**2 for size in sizes)

    # --- one step -----------------------------------------------------------------------------------------------

    def on_megatron_microbatches_start(self, step: Any) -> None:
        self.forget_step()

    def forget_step(self) -> None:
        """After a pass over the step's micro-batches that is not the step itself."""
        self._sums, self._center_sums = {}, {}

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        self._plan = batch["micro_batch"].plan

    def _visit(
        self, chunk: MCoreVisualNevaModel, micro_batch: MicroBatch, states: BranchStates, output: Tensor
    ) -> Tensor:
        """On the last stage: compare what student and teacher make of the branch, and inject the gradient."""
        tokens, config = micro_batch.branch_tokens, self.config
        assert tokens is not None
        student = chunk.laver_head(states.student[tokens.position])
        teacher = chunk.laver_teacher.predict(states.teacher[tokens.position])
        center = chunk.laver_teacher.center if config.centring else None
        mim_sum, _ = masked_prediction_loss(
            student[tokens.masked],
            teacher[tokens.masked],
            config.student_temperature,
            config.teacher_temperature,
            center,
        )
        places = states.student.shape[0]
        whole_student = whole_images(student, tokens, places, self._cut_over)
        gram_sum = self._gram(micro_batch, whole_student, whole_images(teacher, tokens, places, self._cut_over))

        with torch.no_grad():
            similarity, pairs = mean_pairwise_cosine_terms(whole_student.detach(), tokens.own_image)
            entropy = _entropy(teacher[tokens.masked], center, config.teacher_temperature)
            sums = (mim_sum * self._share(micro_batch), gram_sum, similarity, gram_sum.new_tensor(pairs), entropy)
            self._sums[micro_batch.index] = torch.stack([value.detach().double() for value in sums])
            if config.centring:
                self._center_sums[micro_batch.index] = teacher.float().sum(0)
        if not torch.is_grad_enabled():
            return output
        mim_scale = self._scale("mim", micro_batch) * self._share(micro_batch)
        return backpropagate_with(output, mim_sum * mim_scale + gram_sum * self._scale("gram", micro_batch))

    def _gram(self, micro_batch: MicroBatch, student: Tensor, teacher: Tensor) -> Tensor:
        """The Gram term of the images this rank compares, from all their tokens ``[k, d]``."""
        tokens, branch = micro_batch.branch_tokens, micro_batch.branch
        assert tokens is not None and branch is not None
        image = torch.zeros_like(tokens.own_image) if branch.images_together else tokens.own_image
        if self.config.gram_positions == "masked":
            student, teacher = student[tokens.own_masked], teacher[tokens.own_masked]
            image = image[tokens.own_masked.to(image.device)]
        return gram_anchoring_loss(student, teacher, image, self.config.gram_clipped)[0]

    def _share(self, micro_batch: MicroBatch) -> float:
        """What a masked token's loss weighs in L_MIM beside the division by :meth:`_count`."""
        if self.config.mim_reduction == "global":
            return 1.0
        assert micro_batch.branch is not None
        return 1.0 / max(micro_batch.branch.num_masked, 1)

    def _count(self, term: str, plan: StepPlan) -> int:
        from megatron.core import parallel_state as ps

        if term == "gram":
            return plan.gram_entries
        if self.config.mim_reduction == "global":
            return plan.masked_tokens
        return plan.num_microbatches * ps.get_data_parallel_world_size()

    def _scale(self, term: str, micro_batch: MicroBatch) -> float:
        plan = micro_batch.plan
        return term_scale(plan, term, self._count(term, plan), self._neva)

    # --- after the step -----------------------------------------------------------------------------------------

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """Log the global values on every rank; move the centre."""
        assert self._plan is not None
        plan = self._plan
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=torch.cuda.current_device())
        if self._sums and self._counts_here:
            sums += torch.stack(list(self._sums.values())).sum(0)
        dist.all_reduce(sums)
        mim, gram, similarity, pairs, entropy = sums
        self._move_center(plan)
        logged: dict[str, Any] = {
            "laver/mim": global_mean(mim, self._count("mim", plan)),
            "laver/gram": global_mean(gram, plan.gram_entries),
            "laver/similarity": similarity / pairs.clamp(min=1),
            "laver/teacher_entropy": global_mean(entropy, plan.masked_tokens),
            "laver/mask_ratio": self._mask_ratio,
            "laver/mim_weight": plan.weights["mim"],
            "laver/gram_weight": plan.weights["gram"],
        }
        if self._momentum is not None:
            logged["laver/momentum"] = self._momentum
        for name, value in logged.items():
            step.trainer.lightning_module.log(name, torch.as_tensor(value, dtype=torch.float64), batch_size=1)

    @torch.no_grad()
    def _move_center(self, plan: StepPlan) -> None:
        """Once a step: towards the mean of the teacher's logits over all visual tokens of the global batch."""
        from megatron.core import parallel_state as ps

        if not self.config.centring or plan.visual_tokens == 0:
            return
        for chunk in self._chunks:
            if chunk.post_process:
                center = chunk.laver_teacher.center
                assert center is not None
                total = torch.stack(list(self._center_sums.values())).sum(0)
                dist.all_reduce(total, group=ps.get_data_parallel_group(with_context_parallel=True))
                if self._neva.sequence_parallel:
                    dist.all_reduce(total, group=ps.get_tensor_model_parallel_group())
                center.lerp_(total / plan.visual_tokens, 1.0 - self.config.center_momentum)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the optimizer step: move the teacher."""
        done = trainer.global_step
        if not updates_teacher(done, self._interval):
            return
        self._momentum = teacher_momentum(self.config.momentum_schedule, done, trainer.max_steps, self.config.momentum)
        for chunk in self._chunks:
            chunk.laver_teacher.update(self._momentum)


def _entropy(logits: Tensor, center: Tensor | None, temperature: float) -> Tensor:
    """Sum over tokens of the entropy, in nats, of what L_MIM takes as target."""
    log_p = ((logits.float() - (0.0 if center is None else center)) / temperature).log_softmax(-1)
    return -(log_p.exp() * log_p).sum()
