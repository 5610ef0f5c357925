"""A Qwen2.5-VL whose visual tokens see each other both ways, have other rotary positions than M-RoPE's, or come from
AIMv2.

Source: LaVer, arXiv 2512.06281. Only the attention mask, the positions and the tower differ from transformers'
Qwen2_5_VLForConditionalGeneration; the other weights and their names are the same. It takes pictures, no videos, and
knows them by their tokens alone: markers around them are text.

Shape suffixes as in spatial_tokens.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Aimv2VisionConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLModel
from transformers import Qwen2_5_VLPreTrainedModel as PreTrained
from transformers import Qwen2_5_VLTextModel as TextModel
from transformers.generation import GenerationMixin
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

from .configuration_spatial_qwen_vl import SpatialQwenVLConfig
from .native_aimv2 import NativeAimv2
from .spatial_tokens import (
    Grid,
    SpatialRotaryEmbedding,
    check_attention,
    check_cache,
    mask_and_positions,
    visual_structure,
    whole_sequence,
)

HUB_NAMES = {
    "^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
}


class SpatialQwenVLModel(Qwen2_5_VLModel):
    """Qwen2_5_VLModel with the tower that the configuration is of."""

    config_class = SpatialQwenVLConfig

    def __init__(self, config: SpatialQwenVLConfig) -> None:
        PreTrained.__init__(self, config)
        tower = NativeAimv2 if isinstance(config.vision_config, Aimv2VisionConfig) else Tower
        self.visual = tower._from_config(config.vision_config)
        self.language_model = TextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()


class SpatialQwenVLForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):
    """Qwen2_5_VLForConditionalGeneration with the mask and the positions of its :class:`SpatialQwenVLConfig`."""

    config_class = SpatialQwenVLConfig
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Weights have the hub's names or this class's; transformers maps the former for its own classes only."""
        return super().from_pretrained(*args, **{"key_mapping": HUB_NAMES, **kwargs})

    def __init__(self, config: SpatialQwenVLConfig) -> None:
        check_attention(config, config.text_config)
        PreTrained.__init__(self, config)
        self.model = SpatialQwenVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()
        text_model = self.model.language_model
        axes = config.rope_axes or [0] * config.num_frequencies
        text_model.rotary_emb = SpatialRotaryEmbedding(text_model.rotary_emb, axes, three=True)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        past_key_values: Any = None,
        sequence_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss with ``labels``: Qwen2_5_VLForConditionalGeneration's forward pass without
        ``position_ids``, ``inputs_embeds`` and videos.

        Args:
            attention_mask: ``[B, S]``, zero at padding, which may be on either side.
            pixel_values: of the images of ``input_ids``.
            image_grid_thw: of all images so far, also those whose tokens are cached.
            sequence_ids: with a filled cache, the ids ``[B, S]`` of all tokens so far, of which ``input_ids`` are the
                last; :meth:`generate` passes them.

        Raises:
            ValueError: what would be computed with another mask or other positions than this model's.
        """
        check_attention(self.model.language_model.config)
        check_cache(past_key_values)
        refused = ("inputs_embeds", "position_ids", "pixel_values_videos", "video_grid_thw")
        if input_ids is None or any(kwargs.pop(name, None) is not None for name in refused):
            raise ValueError(f"Pass input_ids and none of {', '.join(refused)}: positions follow from ids.")
        ids_BS, real_BS = whole_sequence(input_ids, sequence_ids, attention_mask, past_key_values)
        if pixel_values is not None and image_grid_thw is None:
            raise ValueError("pixel_values come with image_grid_thw: pass what the processor gave.")
        tokens = visual_structure(ids_BS, self.config.image_token_id, self._grids(ids_BS, image_grid_thw))
        dtype = self.get_input_embeddings().weight.dtype
        mask, positions_3BQ = mask_and_positions(
            self.config, tokens, real_BS, input_ids.shape[1], pixel_values is not None, dtype
        )
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=self._new_grids(ids_BS[:, : -input_ids.shape[1]], ids_BS, image_grid_thw),
            attention_mask=mask,
            position_ids=positions_3BQ,
            past_key_values=past_key_values,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """The mixin's: the stock model's would look for its markers around images."""
        check_cache(kwargs.get("past_key_values"))
        model_inputs = GenerationMixin.prepare_inputs_for_generation(self, input_ids, **kwargs)
        if model_inputs["cache_position"][0] != 0:
            model_inputs["pixel_values"] = None
        return {**model_inputs, "position_ids": None, "sequence_ids": input_ids}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat a row's images together for beams."""
        images = {name: model_kwargs.pop(name, None) for name in ("pixel_values", "image_grid_thw")}
        grids = images["image_grid_thw"]
        if grids is not None and images["pixel_values"] is not None and expand_size > 1:
            counts = [len(of_row) for of_row in self._grids(input_ids, grids)]
            patches = [int(of_row.prod(1).sum()) for of_row in grids.split(counts)]
            for name, sizes in (("image_grid_thw", counts), ("pixel_values", patches)):
                of_rows = images[name].split(sizes)
                images[name] = torch.cat([part for part in of_rows for _ in range(expand_size)])
        input_ids, model_kwargs = GenerationMixin._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **images}

    def _new_grids(self, cached_BS: Tensor, ids_BS: Tensor, image_grid_thw: Tensor | None) -> Tensor | None:
        """Grids of the images whose tokens are not cached."""
        if image_grid_thw is None or cached_BS.shape[1] == 0:
            return image_grid_thw
        is_new = []
        cached = (cached_BS == self.config.image_token_id).sum(1).tolist()
        for count, of_row in zip(cached, self._grids(ids_BS, image_grid_thw), strict=True):
            for rows, columns in of_row:
                is_new.append(count <= 0)
                count -= rows * columns
        return image_grid_thw[torch.tensor(is_new, device=image_grid_thw.device)]

    def _grids(self, ids_BS: Tensor, image_grid_thw: Tensor | None) -> list[list[Grid]]:
        """Rows and columns of the images of each row of the batch.

        Raises:
            ValueError: they are not as many tokens as the image tokens of each row.
        """
        merge = self.config.vision_config.spatial_merge_size
        sizes = [] if image_grid_thw is None else image_grid_thw.tolist()
        if any(time != 1 for time, _, _ in sizes):
            raise ValueError(f"image_grid_thw={sizes} has a video: this model takes pictures.")
        left = [(rows // merge, columns // merge) for _, rows, columns in sizes]
        counts = (ids_BS == self.config.image_token_id).sum(1).tolist()
        grids: list[list[Grid]] = []
        unfilled = 0
        for count in counts:
            of_row: list[Grid] = []
            while left and left[0][0] * left[0][1] <= count:
                of_row.append(left.pop(0))
                count -= of_row[-1][0] * of_row[-1][1]
            unfilled += count
            grids.append(of_row)
        if left or unfilled:
            raise ValueError(
                f"image_grid_thw={sizes} does not fit the image tokens of input_ids, {counts} in the rows: it has all "
                f"images so far, each of which takes a row's next tokens, one for {merge} x {merge} patches."
            )
        return grids
