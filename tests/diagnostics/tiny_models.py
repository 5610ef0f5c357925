"""Tiny random vision-language models of other families than LLaVA, written by transformers' own classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.huggingface.tiny import tiny_llava, tiny_processor, tiny_tokenizer

TEXT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
ROLES = (
    "{% for message in messages %}Q: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} A:"
)


def written(family: str, directory: Path) -> Path:
    """``llava`` | ``llava_next`` | ``qwen2_5_vl`` | ``aimv2`` (our code, at native resolution) | ``internvl``, with a
    processor and a chat template."""
    write = {
        "llava": tiny_llava,
        "llava_next": _llava_next,
        "qwen2_5_vl": _qwen,
        "aimv2": _aimv2,
        "internvl": _internvl,
    }[family]
    return write(directory)


def _save(directory: Path, model_class: Any, config: Any, processor: Any) -> Path:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def _tokenizer(tokenizer_class: Any, **more: Any) -> Any:
    same = tiny_tokenizer()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return tokenizer_class(tokenizer_object=same.backend_tokenizer, **special, **more)


def _llava_next(directory: Path) -> Path:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    tokenizer = tiny_processor("clip").tokenizer
    pinpoints = [[16, 32], [32, 16], [32, 32]]
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, image_grid_pinpoints=pinpoints
        ),
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=ROLES.replace("IMAGE", "<image>"),
    )
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaNextConfig(
        vision_config=vision,
        text_config=LlamaConfig(**TEXT),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        vision_feature_select_strategy="default",
    )
    return _save(directory, LlavaNextForConditionalGeneration, config, processor)


QWEN_NAMES = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def _qwen_processor(merge: int, frames: int, max_side: int) -> Any:
    from transformers import Qwen2_5_VLProcessor, Qwen2TokenizerFast, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = _tokenizer(Qwen2TokenizerFast)
    tokenizer.add_special_tokens({"additional_special_tokens": QWEN_NAMES})
    sizes = {"merge_size": merge, "temporal_patch_size": frames, "min_pixels": 24 * 24, "max_pixels": max_side**2}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=4, **sizes),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(),
        chat_template=ROLES.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen(directory: Path) -> Path:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    processor = _qwen_processor(merge=2, frames=2, max_side=64)
    ids = dict(zip(QWEN_NAMES, processor.tokenizer.convert_tokens_to_ids(QWEN_NAMES), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 4,
            "out_hidden_size": 32,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return _save(directory, Qwen2_5_VLForConditionalGeneration, config, processor)


def _aimv2(directory: Path) -> Path:
    from nemo_pre.huggingface.exporter import copy_own_code
    from nemo_pre.huggingface.remote_code.configuration_spatial_qwen_vl import SpatialQwenVLConfig
    from nemo_pre.huggingface.remote_code.modeling_spatial_qwen_vl import SpatialQwenVLForConditionalGeneration

    processor = _qwen_processor(merge=1, frames=1, max_side=32)
    config = SpatialQwenVLConfig(
        text_config={**TEXT, "rope_scaling": {"type": "mrope", "mrope_section": [0, 2, 2]}},
        vision_config={
            "model_type": "aimv2_vision_model",
            "is_native": True,
            "use_head": False,
            "num_hidden_layers": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "patch_size": 4,
            "feature_layer": -2,
            "out_hidden_size": 32,
        },
        image_token_id=processor.tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        visual_attention="mixed",
        visual_rope="2d",
        rope_axes=[1, 2, 1, 2],
    )
    _save(directory, SpatialQwenVLForConditionalGeneration, config, processor)
    copy_own_code("spatial_qwen_vl", directory)
    values = json.loads((directory / "config.json").read_text())
    values["auto_map"] = {
        "AutoConfig": "configuration_spatial_qwen_vl.SpatialQwenVLConfig",
        "AutoModelForImageTextToText": "modeling_spatial_qwen_vl.SpatialQwenVLForConditionalGeneration",
    }
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def _internvl(directory: Path) -> Path:
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )

    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokenizer(PreTrainedTokenizerFast, extra_special_tokens=names)
    context = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(),
        image_seq_length=4,
        chat_template=ROLES.replace("IMAGE", "<IMG_CONTEXT>"),
    )
    config = InternVLConfig(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [16, 16],
            "patch_size": [4, 4],
        },
        text_config=Qwen2Config(**TEXT),
        image_token_id=context,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    return _save(directory, InternVLForConditionalGeneration, config, processor)
