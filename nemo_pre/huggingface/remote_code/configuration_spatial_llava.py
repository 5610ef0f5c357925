"""LLaVA's configuration, plus how visual tokens attend and where they lie (see modeling_spatial_llava.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, LlavaConfig, PretrainedConfig

from .spatial_tokens import check_choices

TEXT_MODELS = ("llama", "qwen2")


class PatchMLPConfig(PretrainedConfig):
    """Patches through an MLP in a vision tower's place: encoder-free.

    Args:
        image_size, patch_size: pixels.
        intermediate_size, hidden_size: outputs of its two layers.
    """

    model_type = "patch_mlp"
    base_config_key = "vision_config"

    def __init__(
        self,
        image_size: int = 384,
        patch_size: int = 16,
        intermediate_size: int = 1024,
        hidden_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.patch_size = patch_size
        self.intermediate_size = intermediate_size
        self.hidden_size = hidden_size


AutoConfig.register(PatchMLPConfig.model_type, PatchMLPConfig, exist_ok=True)


class SpatialLlavaConfig(LlavaConfig):
    """The configuration of a LLaVA with mixed attention and two-dimensional rotary positions.

    Args:
        visual_attention: ``causal``, or ``mixed``: the visual tokens of an image see each other both ways.
        visual_rope: ``1d`` (every token its index), ``2d`` or ``mrope`` (visual tokens have a row and a column).
        rope_axes: for each of the head_dim / 2 rotary frequencies, fastest first, the axis that turns it: 0 time,
            1 row, 2 column. None for ``1d``.
        tile_grid: rows and columns of visual tokens of an image.

    Raises:
        ValueError: a value that is not one of these, or that does not fit the text model or ``image_seq_length``.
    """

    model_type = "spatial_llava"

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        visual_attention: str = "causal",
        visual_rope: str = "1d",
        rope_axes: Sequence[int] | None = None,
        tile_grid: Sequence[int] = (24, 24),
        **kwargs: Any,
    ) -> None:
        self.visual_attention = visual_attention
        self.visual_rope = visual_rope
        self.rope_axes = None if rope_axes is None else list(rope_axes)
        self.tile_grid = list(tile_grid)
        super().__init__(vision_config=vision_config, text_config=text_config, **kwargs)
        self._check_text_model()
        self._check_choices()

    @property
    def num_frequencies(self) -> int:
        """Rotary frequencies of an attention head of the text model."""
        text = self.text_config
        return (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads) // 2

    def _check_text_model(self) -> None:
        text = self.text_config
        if text.model_type not in TEXT_MODELS:
            raise ValueError(f"The text model is '{text.model_type}': it must be one of {', '.join(TEXT_MODELS)}.")

    def _check_choices(self) -> None:
        check_choices(self, self.num_frequencies)
        if len(self.tile_grid) != 2 or min(self.tile_grid) < 1:
            raise ValueError(f"tile_grid={self.tile_grid} must be two positive numbers: rows and columns.")
        if self.tile_grid[0] * self.tile_grid[1] != self.image_seq_length:
            raise ValueError(
                f"tile_grid={self.tile_grid} must have as many tokens as image_seq_length={self.image_seq_length}."
            )
