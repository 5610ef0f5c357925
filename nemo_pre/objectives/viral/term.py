"""VIRAL on the ranks: asks the model for alignment heads, brings the target to the layers, compares the two.

With several target layers the term is the mean of the layers' losses. The paper's means are per device and micro-batch
over samples with one whole image; here they are over the global batch's visual tokens, or matrix entries, whatever the
layout, of samples with any number of images and tiles.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from nemo_pre.losses import gram_anchoring_loss, predictive_loss
from nemo_pre.objectives.scale import StepPlan
from nemo_pre.objectives.viral import NAME, ViralConfig, external_target, has_head
from nemo_pre.objectives.viral.head import AlignmentHeadSpec
from nemo_pre.parallel.image_tokens import whole_images
from nemo_pre.parallel.micro_batch import MicroBatch, VisualTokens
from nemo_pre.parallel.sequence_layout import SequenceLayout
from nemo_pre.parallel.token_streams import VisualBranch, image_sizes
from nemo_pre.terms.layer_term import LayerTerm
from nemo_pre.terms.target_features import TargetFeatures
from nemo_pre.terms.training import VisualChunk, VisualModelConfig

ENTRIES = "viral_entries"  # of the cosine matrices that are compared, over the global batch


class ViralTerm(LayerTerm):
    """VIRAL's term.

    Args:
        options: see :class:`nemo_pre.objectives.viral.ViralConfig`.
        seed: of the heads' initial weights.

    Raises:
        ValueError: an option has a value that it cannot have.
    """

    name = NAME
    options: ViralConfig

    def __init__(self, options: ViralConfig, seed: int = 0) -> None:
        super().__init__(options, seed)
        self._heads: dict[int, nn.Module] = {}
        self._target = TargetFeatures(external_target(options)) if options.target == "external" else None

    # --- what it adds to the model ------------------------------------------------------------------------------

    def prepare_model(self, model: VisualModelConfig) -> None:
        if has_head(self.options):
            model.parts["viral_heads"] = self.head_spec()
        if self.options.form == "similarity":
            model.whole_images = True

    def head_spec(self) -> AlignmentHeadSpec:
        """The heads this objective adds to the model it was prepared for."""
        hidden = [self.options.head_hidden_width] * (self.options.head_depth - 1)
        widths = (self.model.language_transformer_config.hidden_size, *hidden, self.anchor_width())
        return AlignmentHeadSpec(self.layers, widths, self.options.shared_head, self.seed)

    def prepare_chunk(self, chunk: VisualChunk) -> None:
        if has_head(self.options):
            self._heads |= self.head_spec().heads_of(chunk)
        if self._target is not None and chunk.pre_process:
            self._target.install(chunk)

    def remove(self) -> None:
        super().remove()
        self._heads = {}
        if self._target is not None:
            self._target.remove()

    # --- the target ---------------------------------------------------------------------------------------------

    def anchor_width(self) -> int:
        return self.model.vision_projection_config.input_size if self._target is None else self._target.width

    def anchor_dtype(self) -> torch.dtype:
        return super().anchor_dtype() if self._target is None else self._target.dtype

    def anchor(self, chunk: VisualChunk, visual: VisualTokens) -> Tensor:
        return visual.features if self._target is None else self._target.of(chunk, visual)

    # --- one step -----------------------------------------------------------------------------------------------

    def loss_sum(self, layer: int, micro_batch: MicroBatch, visual_tokens: Tensor, anchor: Tensor | None) -> Tensor:
        """The sum over this rank's tokens; with ``form=similarity`` over the images this rank compares."""
        assert anchor is not None
        compared = self._heads[layer](visual_tokens) if has_head(self.options) else visual_tokens
        if self.options.form == "direct":
            return predictive_loss(compared, anchor)[0]
        tokens = micro_batch.image_tokens
        assert tokens is not None
        ranks = 1
        for group in self.image_groups:
            ranks *= group.size()
        places = micro_batch.layout.visual_source_BS.numel() // ranks
        compared, anchor = (whole_images(side, tokens, places, self.image_groups) for side in (compared, anchor))
        return gram_anchoring_loss(compared, anchor, tokens.own_image, clipped=False)[0]

    def counts(self, layout: SequenceLayout, branch: VisualBranch | None) -> Mapping[str, int]:
        return {ENTRIES: sum(size**2 for size in image_sizes(layout).values())}

    def count(self, plan: StepPlan) -> int:
        return plan.visual_tokens if self.options.form == "direct" else plan.counts[ENTRIES]

    def metrics(self, loss: Tensor) -> Mapping[str, Tensor]:
        return {"cosine": -loss} if self.options.form == "direct" else {}
