"""PRe as a callback: installs heads and taps, moves the anchor, injects the gradient, reports the value.

Predictive Regularization (arXiv 2603.20808): the visual tokens of a middle layer predict, through a 2-layer MLP and
a cosine loss, the stop-gradient visual tokens that entered the language model. With several target layers the term
is the mean of the layers' losses.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from nemo_pre.callbacks.layer_tap import LayerTap
from nemo_pre.callbacks.step_planner import step_planner
from nemo_pre.config.derived import target_layers
from nemo_pre.config.schema import PReConfig
from nemo_pre.losses import predictive_loss
from nemo_pre.neva.external_anchor import ExternalAnchor
from nemo_pre.neva.heads import PredictionHeadSpec
from nemo_pre.neva.micro_batch import MicroBatch
from nemo_pre.neva.model import MCoreVisualNevaModel, VisualNevaConfig, VisualTokens, model_chunks
from nemo_pre.objective import StepPlan, global_mean, term_scale
from nemo_pre.parallel.anchor_exchange import AnchorExchange, anchor_group
from nemo_pre.parallel.auxiliary_gradient import backpropagate_with
from nemo_pre.parallel.image_pooling import mean_per_image, share_of_replicated_sum

log = logging.getLogger(__name__)


class PReCallback(Callback):
    """Adds PRe to a NeVA run; without it the run is plain NeVA, bit for bit.

    Args:
        config: see :class:`nemo_pre.config.schema.PReConfig`.
        seed: seed of the heads' initial weights.

    Raises:
        ValueError: at setup, for a target layer the model does not have or an unknown anchor or variant.
    """

    def __init__(self, config: PReConfig, seed: int = 0) -> None:
        self.config = config
        self.seed = seed
        self._chunks: list[MCoreVisualNevaModel] = []
        self._taps: list[LayerTap] = []
        self._exchange: AnchorExchange | None = None
        self._external: ExternalAnchor | None = None
        self._losses: dict[int, dict[int, Tensor]] = {}
        self._plan: StepPlan | None = None

    # --- installation -------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before the model is built: ask it for the heads."""
        neva = pl_module.config
        neva.pre_heads = self.head_spec(neva)
        neva.ema_projector = self.config.ema_momentum is not None
        self.layers, self.anchor_width = neva.pre_heads.layers, neva.pre_heads.output_width
        step_planner(trainer).add_term(self, "pre", self.config.weight, self.config.schedule)

    def head_spec(self, neva: VisualNevaConfig) -> PredictionHeadSpec:
        """The heads this objective adds to a model.

        Raises:
            ValueError: for a target layer the model does not have, or an unknown anchor or variant.
        """
        _check_choice("variant", self.config.variant, ("patch", "global"))
        _check_choice("anchor", self.config.anchor, ("pre_llm", "pre_projector", "external"))
        width = neva.language_transformer_config.hidden_size
        return PredictionHeadSpec(
            layers=target_layers(self.config, neva.language_transformer_config.num_layers),
            input_width=width,
            hidden_width=max(1, round(width * self.config.head_hidden_ratio)),
            output_width=self._anchor_width(neva),
            activation=self.config.head_activation,
            norm=self.config.head_norm,
            seed=self.seed,
        )

    def _anchor_width(self, neva: VisualNevaConfig) -> int:
        if self.config.anchor == "external":
            return ExternalAnchor.width(self.config.external_path)
        if self.config.anchor == "pre_projector":
            return neva.vision_projection_config.input_size
        return neva.language_transformer_config.hidden_size

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights of ``init_from`` are there, those of a checkpoint that is resumed come later."""
        self._install(trainer)
        for chunk in self._chunks:
            if hasattr(chunk, "ema_projection"):
                chunk.ema_projection.load_state_dict(chunk.vision_projection.state_dict())

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._exchange is None:
            self._install(trainer)

    def _install(self, trainer: Trainer) -> None:
        from megatron.core import parallel_state as ps

        chunks = model_chunks(trainer)
        self._neva = chunks[0].config
        for chunk in chunks:
            taps = [
                LayerTap(chunk, number, layer, self._visit)
                for number in self.layers
                if (layer := chunk.decoder_layer(number)) is not None
            ]
            if taps and not self._taps:  # the first tapped chunk fetches for the later ones
                chunk.on_micro_batch.append(self._expect)
            self._taps += taps
            if chunk.add_encoder:
                chunk.on_visual_tokens.append(self._publish)
                self._prepare_anchor(chunk)
        self._heads = {int(n): head for chunk in chunks for n, head in getattr(chunk, "pre_heads", {}).items()}
        # Without sequence parallelism tensor-parallel ranks hold, and report, the same tokens.
        self._counts_here = self._neva.sequence_parallel or ps.get_tensor_model_parallel_rank() == 0
        self._pooling_groups = [
            group
            for group, size in (
                (ps.get_tensor_model_parallel_group(), ps.get_tensor_model_parallel_world_size())
                if self._neva.sequence_parallel
                else (None, 1),
                (ps.get_context_parallel_group(), ps.get_context_parallel_world_size()),
            )
            if size > 1
        ]
        self._chunks = chunks
        group, stage = anchor_group(), ps.get_pipeline_model_parallel_rank()
        readers: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(readers, len(self._taps), group=group)
        self._exchange = AnchorExchange(group, stage, readers)
        self._exchange.connect(next(chunks[0].parameters()).device)

    def _prepare_anchor(self, chunk: MCoreVisualNevaModel) -> None:
        """On the first stage: what computes the anchor beside the live model."""
        if self.config.ema_momentum is not None:
            chunk.ema_projection.float()  # a bf16 average loses updates smaller than its rounding
        if self.config.anchor == "external":
            vision = self._neva.vision_transformer_config
            self._external = ExternalAnchor(
                self.config.external_path,
                self.config.external_image_size,
                next(chunk.vision_projection.parameters()).device,
                vision.image_mean,
                vision.image_std,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take everything off again: a saved or reused model carries no trace but the heads' weights."""
        for tap in self._taps:
            tap.remove()
        for chunk in self._chunks:
            chunk.on_micro_batch = [listener for listener in chunk.on_micro_batch if listener != self._expect]
            chunk.on_visual_tokens = [listener for listener in chunk.on_visual_tokens if listener != self._publish]
        self._taps, self._chunks, self._exchange = [], [], None

    # --- one step -----------------------------------------------------------------------------------------------

    def on_megatron_microbatches_start(self, step: Any) -> None:
        self._losses = {number: {} for number in self.layers}
        for tap in self._taps:
            tap.start_step()

    def forget_step(self) -> None:
        """After a pass over the step's micro-batches that is not the step itself."""
        assert self._exchange is not None
        self._exchange.finish_step()
        self.on_megatron_microbatches_start(None)

    def on_megatron_microbatch_start(self, step: Any, batch: dict[str, Any], forward_callback: Any) -> None:
        self._plan = batch["micro_batch"].plan

    def _expect(self, micro_batch: MicroBatch) -> None:
        """Before a tapped chunk runs: start receiving its anchor."""
        assert self._exchange is not None and micro_batch.local is not None
        source = micro_batch.local.source
        shape = (len(source), self.anchor_width)
        self._exchange.expect(micro_batch.index, shape, self._anchor_dtype(), source.device)

    def _anchor_dtype(self) -> torch.dtype:
        if self.config.ema_momentum is not None or self.config.anchor == "external":
            return torch.float32
        if self._neva.bf16:
            return torch.bfloat16
        return torch.float16 if self._neva.fp16 else self._neva.params_dtype

    @torch.no_grad()
    def _publish(self, chunk: MCoreVisualNevaModel, micro_batch: MicroBatch, visual: VisualTokens) -> None:
        """On the first stage: the anchor of this rank's shard, to whoever taps."""
        assert self._exchange is not None and micro_batch.local is not None
        anchor = self._anchor(chunk, visual).to(self._anchor_dtype())
        self._exchange.publish(micro_batch.index, anchor[micro_batch.local.source])

    def _anchor(self, chunk: MCoreVisualNevaModel, visual: VisualTokens) -> Tensor:
        if self.config.anchor == "pre_projector":
            return visual.features
        if self.config.anchor == "external":
            assert self._external is not None
            if visual.images is None:
                return visual.tokens.new_zeros(0, self.anchor_width)
            return self._external(visual.images, chunk.tile_tokens)
        if self.config.ema_momentum is not None:
            return chunk.ema_projection(visual.features.float())
        return visual.tokens

    def _visit(self, number: int, micro_batch: MicroBatch, hidden_states: Tensor) -> Tensor:
        """On a target layer's output: predict the anchor, note the loss, inject its gradient."""
        assert self._exchange is not None and micro_batch.local is not None
        local = micro_batch.local
        anchor = self._exchange.take(micro_batch.index)
        visual_tokens = hidden_states.reshape(-1, hidden_states.shape[-1])[local.position]
        head = self._heads[number]
        if self.config.variant == "global":
            num_images = int(micro_batch.layout.visual_image_BS.max()) + 1
            visual_tokens, present = mean_per_image(visual_tokens, local.image, num_images, self._pooling_groups)
            anchor, _ = mean_per_image(anchor, local.image, num_images, self._pooling_groups)
            visual_tokens, anchor = visual_tokens[present], anchor[present]
        loss_sum, _ = predictive_loss(head(visual_tokens), anchor)
        if self.config.variant == "global":
            loss_sum = share_of_replicated_sum(loss_sum, self._pooling_groups)
        self._losses[number][micro_batch.index] = loss_sum.detach()
        if not torch.is_grad_enabled():
            return hidden_states
        plan = micro_batch.plan
        scale = term_scale(plan, "pre", self._count(plan), self._neva, parts=len(self.layers))
        return backpropagate_with(hidden_states, loss_sum * scale)

    def _count(self, plan: StepPlan) -> int:
        return plan.images if self.config.variant == "global" else plan.visual_tokens

    # --- after the step -----------------------------------------------------------------------------------------

    def on_megatron_step_end(self, step: Any, microbatch_outputs: Any, reduced: Any) -> None:
        """Log the global value on every rank, whatever stage computed it."""
        assert self._exchange is not None and self._plan is not None
        self._exchange.finish_step()
        sums = torch.stack([self._sum_of(number) for number in self.layers])
        dist.all_reduce(sums)
        losses = global_mean(sums, self._count(self._plan))
        prefix = "" if not step.forward_only else "val/"
        logged = {f"{prefix}pre/loss": losses.mean(), f"{prefix}pre/cosine": -losses.mean()}
        if not step.forward_only:
            logged["pre/weight"] = torch.tensor(self._plan.weights["pre"])
        if len(self.layers) > 1:
            logged |= {f"{prefix}pre/loss_layer_{n}": loss for n, loss in zip(self.layers, losses, strict=True)}
        for name, value in logged.items():
            step.trainer.lightning_module.log(name, value, batch_size=1)

    def _sum_of(self, number: int) -> Tensor:
        device = torch.cuda.current_device()
        losses = list(self._losses[number].values()) if self._counts_here else []
        return torch.stack(losses).sum().double() if losses else torch.zeros((), dtype=torch.float64, device=device)

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the optimizer step: move the averaged projector."""
        momentum = self.config.ema_momentum
        if momentum is None:
            return
        for chunk in self._chunks:
            if chunk.add_encoder:
                live = [parameter.float() for parameter in chunk.vision_projection.parameters()]
                torch._foreach_lerp_(list(chunk.ema_projection.parameters()), live, 1.0 - momentum)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"objective.pre.{name} is '{value}': choose one of {', '.join(choices)}.")
