"""PRe on the ranks: asks the model for prediction heads, chooses the anchor, compares the two, moves the average.

With several target layers the term is the mean of the layers' losses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo_pre.losses import predictive_loss
from nemo_pre.objectives.pre import NAME, PReConfig, external_anchor
from nemo_pre.objectives.pre.head import AveragedProjector, PredictionHeadSpec
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.parallel.image_pooling import mean_per_image
from nemo_pre.parallel.micro_batch import MicroBatch, VisualTokens
from nemo_pre.parallel.sums import share_of_replicated_sum
from nemo_pre.terms.layer_term import LayerTerm
from nemo_pre.terms.target_features import TargetFeatures
from nemo_pre.terms.training import Training, VisualChunk, VisualModelConfig
from nemo_pre.whole_numbers import part_nearest


class PReTerm(LayerTerm):
    """PRe's term; without it the run is plain NeVA, bit for bit.

    Args:
        options: see :class:`nemo_pre.objectives.pre.PReConfig`.
        seed: of the heads' initial weights.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    name = NAME
    options: PReConfig

    def __init__(self, options: PReConfig, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._heads: dict[int, nn.Module] = {}
        self._averaged: list[VisualChunk] = []
        external = options.anchor == "external"
        self._external = TargetFeatures(external_anchor(options)) if external else None

    # --- what it adds to the model ------------------------------------------------------------------------------

    def prepare_model(self, model: VisualModelConfig) -> None:
        model.parts["pre_heads"] = self.head_spec()
        if self.options.ema_momentum is not None:
            model.parts["ema_projection"] = AveragedProjector(model.vision_projection_config)

    def head_spec(self) -> PredictionHeadSpec:
        """The heads this objective adds to the model it was prepared for."""
        width = self.model.language_transformer_config.hidden_size
        return PredictionHeadSpec(
            layers=self.layers,
            input_width=width,
            hidden_width=max(1, part_nearest(self.options.head_hidden_ratio, width)),
            output_width=self.anchor_width(),
            activation=self.options.head_activation,
            norm=self.options.head_norm,
            seed=self.seed,
        )

    def anchor_width(self) -> int:
        if self._external is not None:
            return self._external.width
        if self.options.anchor == "pre_projector":
            return self.model.vision_projection_config.input_size
        return self.model.language_transformer_config.hidden_size

    def prepare_chunk(self, chunk: VisualChunk) -> None:
        """The heads of this chunk's layers; on the first stage what computes the anchor beside the live model."""
        self._heads |= {int(number): head for number, head in getattr(chunk, "pre_heads", {}).items()}
        if not chunk.pre_process:
            return
        if self.options.ema_momentum is not None:
            average = _average(chunk)
            average.float()  # a bf16 average loses updates smaller than its rounding
            average.load_state_dict(chunk.vision_projection.state_dict())
            self._averaged.append(chunk)
        if self._external is not None:
            self._external.install(chunk)

    def remove(self) -> None:
        super().remove()
        self._heads, self._averaged = {}, []
        if self._external is not None:
            self._external.remove()

    # --- one step -----------------------------------------------------------------------------------------------

    def anchor_dtype(self) -> torch.dtype:
        if self._external is not None:
            return self._external.dtype
        if self.options.ema_momentum is not None:
            return torch.float32
        return super().anchor_dtype()

    def anchor(self, chunk: VisualChunk, visual: VisualTokens) -> Tensor:
        if self.options.anchor == "pre_projector":
            return visual.features
        if self._external is not None:
            return self._external.of(chunk, visual)
        if self.options.ema_momentum is not None:
            return _average(chunk)(visual.features.float())
        return super().anchor(chunk, visual)

    def loss_sum(self, layer: int, micro_batch: MicroBatch, visual_tokens: Tensor, anchor: Tensor | None) -> Tensor:
        """The loss summed over this rank's tokens; with ``variant=global`` this rank's share of the sum over the
        micro-batch's images."""
        assert anchor is not None
        if self.options.variant == "patch":
            return predictive_loss(self._heads[layer](visual_tokens), anchor)[0]
        assert micro_batch.local is not None
        image, num_images = micro_batch.local.image, micro_batch.layout.num_images
        tokens_of, anchor_of = (
            mean_per_image(each, image, num_images, self.image_groups) for each in (visual_tokens, anchor)
        )
        loss_sum, _ = predictive_loss(self._heads[layer](tokens_of), anchor_of)
        return share_of_replicated_sum(loss_sum, self.image_groups)

    def count(self, plan: StepPlan) -> int:
        return plan.images if self.options.variant == "global" else plan.visual_tokens

    def metrics(self, loss: Tensor) -> Mapping[str, Tensor]:
        return {"cosine": -loss}

    @torch.no_grad()
    def after_update(self, training: Training) -> None:
        """Move the averaged projector."""
        momentum = self.options.ema_momentum
        for chunk in self._averaged:
            assert momentum is not None
            live = [parameter.float() for parameter in chunk.vision_projection.parameters()]
            torch._foreach_lerp_(list(_average(chunk).parameters()), live, 1.0 - momentum)


def _average(chunk: VisualChunk) -> nn.Module:
    return chunk.ema_projection  # type: ignore[attr-defined]
