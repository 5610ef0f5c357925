"""PRe as a callback: asks the model for prediction heads, chooses the anchor, compares the two, moves the average.

Predictive Regularization (arXiv 2603.20808): the visual tokens of a middle layer predict, through a 2-layer MLP and
a cosine loss, the stop-gradient visual tokens that entered the language model. With several target layers the term
is the mean of the layers' losses.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from nemo_pre.callbacks.layer_objective import LayerObjective
from nemo_pre.config.derived import target_layers
from nemo_pre.config.schema import PReConfig
from nemo_pre.config.targets import Target, external_anchor
from nemo_pre.data.features import read_features
from nemo_pre.losses import predictive_loss
from nemo_pre.neva.frozen_vision import FrozenVision
from nemo_pre.neva.heads import PredictionHeadSpec
from nemo_pre.neva.micro_batch import MicroBatch
from nemo_pre.neva.model import MCoreVisualNevaModel, VisualNevaConfig, VisualTokens
from nemo_pre.neva.vision_facts import vision_facts
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.image_pooling import mean_per_image, share_of_replicated_sum


class PReCallback(LayerObjective):
    """Adds PRe to a NeVA run; without it the run is plain NeVA, bit for bit.

    Args:
        config: see :class:`nemo_pre.config.schema.PReConfig`.
        seed: seed of the heads' initial weights.

    Raises:
        ValueError: at setup, for a target layer the model does not have or an unknown anchor or variant.
    """

    def __init__(self, config: PReConfig, seed: int = 0) -> None:
        super().__init__("pre", config.weight, config.schedule)
        self.config = config
        self.seed = seed
        self._heads: dict[int, nn.Module] = {}
        self._averaged: list[MCoreVisualNevaModel] = []
        self._external: FrozenVision | None = None

    # --- what it adds to the model ------------------------------------------------------------------------------

    def prepare_model(self, neva: VisualNevaConfig) -> tuple[tuple[int, ...], int]:
        neva.pre_heads = self.head_spec(neva)
        neva.ema_projector = self.config.ema_momentum is not None
        return neva.pre_heads.layers, neva.pre_heads.output_width

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
            return self._target_width(external_anchor(self.config))
        if self.config.anchor == "pre_projector":
            return neva.vision_projection_config.input_size
        return neva.language_transformer_config.hidden_size

    @staticmethod
    def _target_width(target: Target) -> int:
        if target.features is not None:
            return read_features(target.features, target.option("features")).width
        return vision_facts(target).width

    def prepare_chunk(self, chunk: MCoreVisualNevaModel) -> None:
        """The heads of this chunk's layers; on the first stage what computes the anchor beside the live model."""
        self._heads |= {int(number): head for number, head in getattr(chunk, "pre_heads", {}).items()}
        if not chunk.add_encoder:
            return
        if self.config.ema_momentum is not None:
            chunk.ema_projection.float()  # a bf16 average loses updates smaller than its rounding
            chunk.ema_projection.load_state_dict(chunk.vision_projection.state_dict())
            self._averaged.append(chunk)
        if self.config.anchor == "external" and self.config.external_features is None:
            vision, device = self.neva.vision_transformer_config, next(chunk.vision_projection.parameters()).device
            target = external_anchor(self.config)
            self._external = FrozenVision(target, device, vision.image_mean, vision.image_std)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._heads, self._averaged, self._external = {}, [], None

    # --- one step -----------------------------------------------------------------------------------------------

    def anchor_dtype(self) -> torch.dtype:
        if self.config.ema_momentum is not None or self.config.anchor == "external":
            return torch.float32
        return super().anchor_dtype()

    def anchor(self, chunk: MCoreVisualNevaModel, visual: VisualTokens) -> Tensor:
        if self.config.anchor == "pre_projector":
            return visual.features
        if self.config.anchor == "external":
            if not len(visual.tokens):
                return visual.tokens.new_zeros(0, self.anchor_width)
            if self._external is None:
                return visual.targets["pre"]
            assert visual.images is not None
            return self._external(visual.images, chunk.tile_tokens).flatten(0, 1)
        if self.config.ema_momentum is not None:
            return chunk.ema_projection(visual.features.float())
        return super().anchor(chunk, visual)

    def loss_sum(self, layer: int, micro_batch: MicroBatch, visual_tokens: Tensor, anchor: Tensor) -> Tensor:
        """Of this rank's tokens; of ``variant=global`` this rank's share of the micro-batch's images."""
        if self.config.variant == "patch":
            return predictive_loss(self._heads[layer](visual_tokens), anchor)[0]
        assert micro_batch.local is not None
        image, num_images = micro_batch.local.image, int(micro_batch.layout.visual_image_BS.max()) + 1
        visual_tokens, present = mean_per_image(visual_tokens, image, num_images, self.cut_over)
        anchor, _ = mean_per_image(anchor, image, num_images, self.cut_over)
        loss_sum, _ = predictive_loss(self._heads[layer](visual_tokens[present]), anchor[present])
        return share_of_replicated_sum(loss_sum, self.cut_over)

    def count(self, plan: StepPlan) -> int:
        return plan.images if self.config.variant == "global" else plan.visual_tokens

    def metrics(self, loss: Tensor) -> dict[str, Tensor]:
        return {"cosine": -loss}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """After the optimizer step: move the averaged projector."""
        momentum = self.config.ema_momentum
        for chunk in self._averaged:
            assert momentum is not None
            live = [parameter.float() for parameter in chunk.vision_projection.parameters()]
            torch._foreach_lerp_(list(chunk.ema_projection.parameters()), live, 1.0 - momentum)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"objective.pre.{name} is '{value}': choose one of {', '.join(choices)}.")
