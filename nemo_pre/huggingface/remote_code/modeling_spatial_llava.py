"""A LLaVA whose visual tokens see each other both ways and have positions in two dimensions, or without an encoder.

Source: LaVer, arXiv 2512.06281. Only the attention mask, the rotary positions and a patch MLP as a vision tower differ
from transformers' LlavaForConditionalGeneration; weights and their names are the same.

Shape suffixes as in spatial_tokens.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_spatial_llava import PatchMLPConfig, SpatialLlavaConfig
from .spatial_tokens import (
    SpatialRotaryEmbedding,
    check_attention,
    check_cache,
    mask_and_positions,
    visual_structure,
    whole_sequence,
)

HUB_NAMES = {
    "^language_model.model": "model.language_model",
    "^language_model.lm_head": "lm_head",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
}


class PatchMLPModel(PreTrainedModel):
    """Each patch by itself through two layers; ``hidden_states`` has their output ``[B, patches, hidden_size]``."""

    config_class = PatchMLPConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True  # it has no attention at all

    def __init__(self, config: PatchMLPConfig) -> None:
        super().__init__(config)
        patch, inner = config.patch_size, config.intermediate_size
        self.patch_embedding = nn.Conv2d(3, inner, kernel_size=patch, stride=patch)
        self.activation = nn.GELU()
        self.output = nn.Linear(inner, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        pixel_values = pixel_values.to(self.patch_embedding.weight.dtype)
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        features = self.output(self.activation(patches))
        return BaseModelOutput(last_hidden_state=features, hidden_states=(features,))


AutoModel.register(PatchMLPConfig, PatchMLPModel, exist_ok=True)


class SpatialLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with the mask and the positions of its :class:`SpatialLlavaConfig`."""

    config_class = SpatialLlavaConfig
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Weights have the hub's names or this class's; transformers 5 maps the former for its own classes only."""
        return super().from_pretrained(*args, **{"key_mapping": HUB_NAMES, **kwargs})

    def __init__(self, config: SpatialLlavaConfig) -> None:
        check_attention(config, config.text_config)
        super().__init__(config)
        text_model = self.model.language_model
        text_model.rotary_emb = SpatialRotaryEmbedding(
            text_model.rotary_emb, config.rope_axes or [0] * config.num_frequencies
        )

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        past_key_values: Any = None,
        sequence_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss with ``labels``: LlavaForConditionalGeneration's forward pass without ``position_ids``
        and ``inputs_embeds``.

        Args:
            attention_mask: ``[B, S]``, zero at padding, which may be on either side.
            sequence_ids: with a filled cache, the ids ``[B, S]`` of all tokens so far, of which ``input_ids`` are the
                last; :meth:`generate` passes them.

        Raises:
            ValueError: what would be computed with another mask or other positions than this model's.
        """
        check_attention(self.model.language_model.config)
        check_cache(past_key_values)
        if input_ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("position_ids") is not None:
            raise ValueError("Pass input_ids and neither inputs_embeds nor position_ids: positions follow from ids.")
        if pixel_values is not None:
            self._images_per_row(input_ids, pixel_values)
        ids_BS, real_BS = whole_sequence(input_ids, sequence_ids, attention_mask, past_key_values)
        tokens = visual_structure(ids_BS, self.config.image_token_index, self._grids(ids_BS))
        dtype = self.get_input_embeddings().weight.dtype
        mask, positions_3BQ = mask_and_positions(
            self.config, tokens, real_BS, input_ids.shape[1], pixel_values is not None, dtype
        )
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=mask,
            position_ids=positions_3BQ,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        check_cache(kwargs.get("past_key_values"))
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**model_inputs, "sequence_ids": input_ids}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat a row's images together for beams; the stock method repeats each image by itself."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            of_rows = pixel_values.split(self._images_per_row(input_ids, pixel_values))
            repeated = torch.cat([images for images in of_rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if pixel_values is None else {**model_kwargs, "pixel_values": repeated}

    def _grids(self, ids_BS: Tensor) -> list[list[tuple[int, int]]]:
        """Grids of every row's images, which are all alike; too few tokens for one are none."""
        rows, columns = self.config.tile_grid
        counts = (ids_BS == self.config.image_token_index).sum(1).tolist()
        return [[(rows, columns)] * (count // (rows * columns)) for count in counts]

    def _images_per_row(self, ids_BS: Tensor, pixel_values: Tensor) -> list[int]:
        size = self.config.tile_grid[0] * self.config.tile_grid[1]
        tokens = (ids_BS == self.config.image_token_index).sum(1).tolist()
        if any(count % size for count in tokens) or sum(tokens) != size * len(pixel_values):
            raise ValueError(
                f"The rows of input_ids have {tokens} image tokens and pixel_values {len(pixel_values)} images: each "
                f"image takes {size} tokens."
            )
        return [count // size for count in tokens]
