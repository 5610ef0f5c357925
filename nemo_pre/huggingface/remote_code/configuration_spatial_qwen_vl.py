"""Qwen2.5-VL's configuration, plus how visual tokens attend and where they lie, and which tower gives them (see
modeling_spatial_qwen_vl.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import Aimv2VisionConfig, Qwen2_5_VLConfig

from .spatial_tokens import check_choices


class SpatialQwenVLConfig(Qwen2_5_VLConfig):
    """The configuration of a Qwen2.5-VL with mixed attention, other rotary positions than M-RoPE's, or another tower.

    Args:
        vision_config: Qwen2.5-VL's, or AIMv2's with what native_aimv2.py asks for beside it.
        visual_attention: ``causal``, or ``mixed``: the visual tokens of an image see each other both ways.
        visual_rope: ``1d`` (every token its index), ``2d`` or ``mrope`` (visual tokens have a row and a column).
        rope_axes: for each of the head_dim / 2 rotary frequencies, fastest first, the axis that turns it: 0 time,
            1 row, 2 column. None for ``1d``.

    Raises:
        ValueError: a value that is not one of these, or that does not fit the text model.
    """

    model_type = "spatial_qwen_vl"

    def __init__(
        self,
        text_config: Any = None,
        vision_config: Any = None,
        *,
        visual_attention: str = "causal",
        visual_rope: str = "1d",
        rope_axes: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        is_aimv2 = isinstance(vision_config, dict) and vision_config.get("model_type") == Aimv2VisionConfig.model_type
        super().__init__(text_config=text_config, vision_config=None if is_aimv2 else vision_config, **kwargs)
        if is_aimv2:
            self.vision_config = Aimv2VisionConfig(**{"spatial_merge_size": 1, **vision_config})
        self.visual_attention = visual_attention
        self.visual_rope = visual_rope
        self.rope_axes = None if rope_axes is None else list(rope_axes)
        check_choices(self, self.num_frequencies)

    @property
    def num_frequencies(self) -> int:
        """Rotary frequencies of an attention head of the text model."""
        text = self.text_config
        return int(text.hidden_size // text.num_attention_heads // 2)
