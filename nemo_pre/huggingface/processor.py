"""What lies beside an exported model's weights: tokenizer with the image's token, image processor, chat template,
generation settings. They give the token ids and pixels that training saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from nemo_pre.config.schema import ModelConfig
from nemo_pre.config.vision_families import class_tokens
from nemo_pre.data.conversation import IMAGE_TAG, TEMPLATES, ChatTemplate, end_of_answer
from nemo_pre.huggingface.architecture import SPATIAL
from nemo_pre.huggingface.importer import ORIGINAL


def write_processor(saved: Any, model: ModelConfig, checkpoint: Path, directory: Path) -> int:
    """Write every file of the directory but weights, ``config.json`` and card; returns the image's token id.

    A LLaVA that was imported and not trained keeps its own files.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    original = checkpoint / ORIGINAL
    if original.is_dir():
        values = json.loads((original / "config.json").read_text())
        if values.get("model_type") in ("llava", SPATIAL):
            for path in sorted(original.iterdir()):
                if path.name not in ("config.json", "README.md"):
                    shutil.copyfile(path, directory / path.name)
            return int(values.get("image_token_index", values.get("image_token_id")))
    tokenizer = _tokenizer(saved, model)
    processor = _processor(tokenizer, model, saved.data)
    processor.save_pretrained(directory)
    image_token_id = int(tokenizer.convert_tokens_to_ids(IMAGE_TAG))
    _write_generation_config(tokenizer, saved.data.chat_template, image_token_id, directory)
    return image_token_id


def _tokenizer(saved: Any, model: ModelConfig) -> Any:
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.tokenizer import load_tokenizer

    path = model.tokenizer or read_manifest(saved.data.path).tokenizer
    if path is None:
        raise ValueError(f"No tokenizer lies with {saved.data.path}, which the run was trained on: put it back there.")
    tokenizer = load_tokenizer(path)
    if tokenizer.convert_tokens_to_ids(IMAGE_TAG) in (None, tokenizer.unk_token_id):
        tokenizer.add_special_tokens(
            {"additional_special_tokens": [IMAGE_TAG]}, replace_additional_special_tokens=False
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # batches are for generation
    names = ["input_ids", "attention_mask"]  # no model of ours takes token types
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _processor(tokenizer: Any, model: ModelConfig, data: Any) -> Any:
    from transformers import LlavaProcessor

    vision = model.vision
    return LlavaProcessor(
        image_processor=_image_processor(model, data),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if vision.drop_class_token else "full",
        num_additional_image_tokens=class_tokens(vision),
        chat_template=jinja_template(TEMPLATES[data.chat_template], _adds_bos(tokenizer)),
    )


def _image_processor(model: ModelConfig, data: Any) -> Any:
    """The processor whose pixels are those of :mod:`nemo_pre.data.images`."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

    vision = model.vision
    square = {"height": vision.image_size, "width": vision.image_size}
    how = {
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": {"bicubic": 3, "bilinear": 2}[data.image_filter],
        "do_convert_rgb": True,
    }
    if data.max_tiles > 1:
        raise ValueError(
            f"The run was trained with data.max_tiles={data.max_tiles}, and a LLaVA's picture has one tile: such a "
            f"model cannot be exported yet."
        )
    if data.image_resize == "whole" and vision.family == "siglip":
        return SiglipImageProcessor(size=square, **how)
    if data.image_resize == "whole":
        return CLIPImageProcessor(size=square, do_center_crop=False, crop_size=square, **how)
    short = {"size": {"shortest_edge": vision.image_size}, "crop_size": square, "do_center_crop": True}
    if data.image_resize == "crop":
        return CLIPImageProcessor(**short, **how)
    return LlavaImageProcessor(do_pad=True, **short, **how)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def jinja_template(template: ChatTemplate, tokenizer_adds_bos: bool) -> str:
    """Our chat template in the language of ``transformers``: contents are text, or lists of images and texts; an
    image is followed by a line break where text follows it, as in LLaVA's data."""
    bos = "" if tokenizer_adds_bos else "{{ bos_token if bos_token else '' }}"
    image = f"{{{{ {json.dumps(IMAGE_TAG)} }}}}"
    line_break = "" if not template.keep_question else r"{% if not loop.last %}{{ '\n' }}{% endif %}"
    text = "{{ part['text'] }}" if template.keep_question else ""
    question = _trimmed(
        "{% if message['content'] is string %}"
        + ("{{ message['content'] }}" if template.keep_question else "")
        + "{% else %}{% for part in message['content'] %}"
        + "{% if part['type'] == 'image' %}"
        + image
        + line_break
        + "{% elif part['type'] == 'text' %}"
        + text
        + "{% endif %}{% endfor %}{% endif %}",
        template,
    )
    answer = _trimmed(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}",
        template,
    )
    end = _literal(template.answer_end) or "{{ eos_token }}"
    between_turns = ""
    if template.between_turns:
        between_turns = "{% if not loop.first %}" + _literal(template.between_turns) + "{% endif %}"
    return (
        bos
        + _literal(template.system)
        + "{% for message in messages %}{% if message['role'] == 'user' %}"
        + between_turns
        + _literal(template.before_question)
        + question
        + "{% elif message['role'] == 'assistant' %}"
        + _literal(template.before_answer + template.answer_lead)
        + answer
        + end
        + "{% else %}{{ raise_exception('Only user and assistant take part in a conversation.') }}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + _literal(template.before_answer)
        + "{% endif %}"
    )


def _trimmed(content: str, template: ChatTemplate) -> str:
    return "{% set content %}" + content + "{% endset %}{{ content | trim }}" if template.trim else content


def _literal(text: str) -> str:
    """Inside an expression, where Jinja leaves spaces and line breaks alone."""
    return f"{{{{ {json.dumps(text)} }}}}" if text else ""


def _write_generation_config(tokenizer: Any, template: str, image_token_id: int, directory: Path) -> None:
    from transformers import GenerationConfig

    ends = sorted({tokenizer.eos_token_id, end_of_answer(tokenizer, template)})
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=tokenizer.pad_token_id,
        suppress_tokens=[image_token_id],  # a row that was never trained
    ).save_pretrained(directory)
