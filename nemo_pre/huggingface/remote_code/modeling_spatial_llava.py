"""A LLaVA whose visual tokens see each other both ways and have positions in two dimensions, or without an encoder.

Source: LaVer, arXiv 2512.06281. Only the attention mask, the rotary positions and a patch MLP as a vision tower differ
from transformers' LlavaForConditionalGeneration; weights and their names are the same. Mask and positions follow from
the token ids and the padding mask of the whole sequence, so that nothing is remembered from one step of generation to
the next.

Shape suffixes: B batch, S tokens so far, Q the last of them, which a forward computes (without a cache, all), D head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlavaForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_spatial_llava import PatchMLPConfig, SpatialLlavaConfig

HUB_NAMES = {
    "^language_model.model": "model.language_model",
    "^language_model.lm_head": "lm_head",
    "^vision_tower": "model.vision_tower",
    "^multi_modal_projector": "model.multi_modal_projector",
}
ATTENTION = ("eager", "sdpa")  # those that take any mask


def visual_structure(ids_BS: Tensor, image_token: int, tokens_per_image: int) -> tuple[Tensor, Tensor]:
    """The image of every token, counted along its row, -1 for text; and its number within that image.

    Image tokens that are too few for an image, as a model may write them, are text.
    """
    is_image_BS = ids_BS == image_token
    whole_B1 = is_image_BS.sum(1, keepdim=True) // tokens_per_image
    number_BS = is_image_BS.cumsum(1) - 1
    image_BS = number_BS // tokens_per_image
    image_BS = torch.where(is_image_BS & (image_BS < whole_B1), image_BS, -1)
    return image_BS, number_BS % tokens_per_image


def spatial_positions(
    image_BS: Tensor, patch_BS: Tensor, real_BS: Tensor, tile_grid: tuple[int, int], rope: str
) -> Tensor:
    """Positions ``[3, B, S]`` along time, row and column.

    Text number p is at (p, p, p); patch (i, j) of an image that starts at s is at (s, s + i, s + j); what follows is
    at the largest position so far plus one. For ``1d`` all axes count the tokens. Padding does not count.
    """
    if rope == "1d":
        return (real_BS.long().cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    rows, columns = tile_grid
    is_visual_BS = image_BS >= 0
    is_last_BS = patch_BS == rows * columns - 1
    advance_BS = torch.where(is_visual_BS, is_last_BS * max(rows, columns), 1) * real_BS
    start_BS = advance_BS.cumsum(1) - advance_BS
    row_BS = torch.where(is_visual_BS, patch_BS // columns, 0)
    column_BS = torch.where(is_visual_BS, patch_BS % columns, 0)
    return torch.stack([start_BS, start_BS + row_BS, start_BS + column_BS])


def mixed_attention_mask(image_BS: Tensor, real_BS: Tensor, num_queries: int) -> Tensor:
    """Boolean ``[B, 1, Q, S]``, which tokens each query sees: those not after it and those of its own image.

    Padding is seen by no other token, and sees itself so that no row of the mask is empty.
    """
    index_S = torch.arange(image_BS.shape[1], device=image_BS.device)
    query_Q1 = index_S[-num_queries:, None]
    image_BQ1 = image_BS[:, -num_queries:, None]
    same_image_BQS = (image_BQ1 == image_BS[:, None]) & (image_BQ1 >= 0)
    seen_BQS = ((index_S <= query_Q1) | same_image_BQS) & real_BS[:, None]
    return (seen_BQS | (index_S == query_Q1))[:, None]


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


class SpatialRotaryEmbedding(nn.Module):
    """The text model's own rotary embedding, each frequency turned by the position on its axis.

    Args:
        stock: the text model's, which knows its rope scaling.
        axes: of each frequency, 0 time, 1 row, 2 column.
    """

    def __init__(self, stock: nn.Module, axes: list[int]) -> None:
        super().__init__()
        self.stock = stock
        self.axes = axes

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine ``[B, Q, D]`` of the angles at ``position_ids`` ``[3, B, Q]``."""
        if position_ids.ndim != 3:
            raise ValueError("Call SpatialLlavaForConditionalGeneration, not its text model: positions have 3 axes.")
        _, batch, length = position_ids.shape
        axis_D = torch.tensor(self.axes + self.axes, device=x.device)  # the halves of a head share their frequencies
        index_1BQD = axis_D.expand(1, batch, length, -1)
        of_all_axes = self.stock(x, position_ids.flatten(0, 1))  # at once: some scalings look at the largest position
        cos, sin = (values.unflatten(0, (3, batch)).gather(0, index_1BQD)[0] for values in of_all_axes)
        return cos, sin


class SpatialLlavaForConditionalGeneration(LlavaForConditionalGeneration):
    """LlavaForConditionalGeneration with the mask and the positions of its :class:`SpatialLlavaConfig`."""

    config_class = SpatialLlavaConfig
    _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = False

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Weights have the hub's names or this class's; transformers 5 maps the former for its own classes only."""
        return super().from_pretrained(*args, **{"key_mapping": HUB_NAMES, **kwargs})

    def __init__(self, config: SpatialLlavaConfig) -> None:
        _check_attention(config, config.text_config)
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
        """As LlavaForConditionalGeneration's, without ``position_ids`` and ``inputs_embeds``.

        Args:
            attention_mask: ``[B, S]``, zero at padding, which may be on either side.
            sequence_ids: with a filled cache, the ids ``[B, S]`` of all tokens so far, of which ``input_ids`` are the
                last; :meth:`generate` passes them.

        Raises:
            ValueError: what would be computed with another mask or other positions than this model's.
        """
        _check_attention(self.model.language_model.config)
        _check_cache(past_key_values)
        if input_ids is None or kwargs.get("inputs_embeds") is not None or kwargs.get("position_ids") is not None:
            raise ValueError("Pass input_ids and neither inputs_embeds nor position_ids: positions follow from ids.")
        if pixel_values is not None:
            self._images_per_row(input_ids, pixel_values)

        ids_BS = input_ids if sequence_ids is None else sequence_ids
        num_cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        if ids_BS.shape[1] != num_cached + input_ids.shape[1]:
            raise ValueError(
                f"{num_cached} tokens are cached and {input_ids.shape[1]} are new: pass the ids of all of them as "
                f"sequence_ids, which generate does for a prompt in one piece."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(ids_BS)
        if attention_mask.shape != ids_BS.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}: it must have {list(ids_BS.shape)}, the batch "
                f"and all tokens so far."
            )

        rows, columns = self.config.tile_grid
        real_BS = attention_mask.bool()
        image_BS, patch_BS = visual_structure(ids_BS, self.config.image_token_index, rows * columns)
        positions_3BS = spatial_positions(image_BS, patch_BS, real_BS, (rows, columns), self.config.visual_rope)
        has_images = bool((image_BS[:, -input_ids.shape[1] :] >= 0).any())
        if has_images and pixel_values is None:
            raise ValueError("input_ids hold an image, so pass pixel_values; generate does with an empty cache only.")
        if has_images and self.config.visual_attention == "mixed":
            seen = mixed_attention_mask(image_BS, real_BS, input_ids.shape[1])
            attention_mask = _additive(seen, self.get_input_embeddings().weight.dtype)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,  # [B, S] is made causal by the text model
            position_ids=positions_3BS[:, :, -input_ids.shape[1] :],
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        _check_cache(kwargs.get("past_key_values"))
        model_inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        return {**model_inputs, "sequence_ids": input_ids}

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: Tensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """For beams, a row's images are repeated together; the stock method repeats each image by itself."""
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None:
            of_rows = pixel_values.split(self._images_per_row(input_ids, pixel_values))
            repeated = torch.cat([images for images in of_rows for _ in range(expand_size)])
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs if pixel_values is None else {**model_kwargs, "pixel_values": repeated}

    def _images_per_row(self, ids_BS: Tensor, pixel_values: Tensor) -> list[int]:
        size = self.config.tile_grid[0] * self.config.tile_grid[1]
        tokens = (ids_BS == self.config.image_token_index).sum(1).tolist()
        if any(count % size for count in tokens) or sum(tokens) != size * len(pixel_values):
            raise ValueError(
                f"The rows of input_ids have {tokens} image tokens and pixel_values {len(pixel_values)} images: each "
                f"image takes {size} tokens."
            )
        return [count // size for count in tokens]


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _check_attention(*configs: Any) -> None:
    for config in configs:
        chosen = config._attn_implementation
        if chosen not in (None, *ATTENTION):
            raise ValueError(f"attn_implementation is '{chosen}': choose {' or '.join(ATTENTION)}.")


def _check_cache(cache: Any) -> None:
    if getattr(cache, "is_compileable", False):
        raise ValueError(f"{type(cache).__name__} has a fixed length: leave cache_implementation out.")
