"""Tiny random LLaVA directories, written by transformers' own classes as on the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

IMAGE_SIZE, PATCH_SIZE = 16, 4
WITH_CLASS_TOKEN = ("clip", "dinov2")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}"
    "{% endif %}{% endfor %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def tiny_llava(
    directory: Path,
    language: str = "llama",
    vision: str = "clip",
    seed: int = 0,
    tie: bool = False,
    **text_options: Any,
) -> Path:
    """Write a random LLaVA with tokenizer, processor and chat template.

    Languages: ``llama`` | ``qwen2``; towers: ``clip`` | ``siglip`` | ``dinov2`` | ``aimv2``.
    16 visual tokens an image, 4 layers of width 32 with 4 heads and 2 query groups; ids from ``len(tokenizer)`` to the
    vocabulary's 300 belong to no token.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    processor = tiny_processor(vision)
    text = _text_config(language, tie, text_options)
    config = LlavaConfig(
        vision_config=_vision_config(vision),
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision in WITH_CLASS_TOKEN else "full",
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=tie,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).eval()
        for parameter in model.parameters():  # norms and biases too: a swapped pair of them must show
            torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.1 if parameter.ndim == 1 else 0.2)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def write_image_processor(directory: Path, family: str, image_size: int) -> None:
    """The processor of a tower by itself, as published."""
    from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor

    square = {"height": image_size, "width": image_size}
    if family == "siglip":
        processor: Any = SiglipImageProcessor(size=square)
    else:
        kind = BitImageProcessor if family == "dinov2" else CLIPImageProcessor
        processor = kind(size={"shortest_edge": image_size}, crop_size=square)
    processor.save_pretrained(directory)


def tiny_processor(vision: str) -> Any:
    from transformers import CLIPImageProcessor, LlavaProcessor, SiglipImageProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    if vision == "siglip":
        image_processor = SiglipImageProcessor(size=size)
    else:
        image_processor = CLIPImageProcessor(size=size, do_center_crop=False)
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tiny_tokenizer(),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default" if vision in WITH_CLASS_TOKEN else "full",
        num_additional_image_tokens=1 if vision in WITH_CLASS_TOKEN else 0,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_tokenizer() -> Any:
    """Every byte is a token, so that every text is known."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<s>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )
    llama3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    vision = ["<|vision_start|>", "<|vision_end|>"]
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>", *llama3, *vision]})
    fast.image_token = "<image>"
    return fast


def _text_config(language: str, tie: bool, options: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, Qwen2Config

    shape = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tie,
        "rope_theta": 10000.0,
        **options,
    }
    return {"llama": LlamaConfig, "qwen2": Qwen2Config}[language](**shape)


def _vision_config(vision: str) -> Any:
    from transformers import Aimv2VisionConfig, CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    if vision == "dinov2":
        return Dinov2Config(mlp_ratio=2, **shape)
    if vision == "aimv2":
        return Aimv2VisionConfig(intermediate_size=40, use_head=False, **shape)
    return {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[vision](intermediate_size=40, **shape)
