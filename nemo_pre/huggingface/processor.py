"""What lies beside an exported model's weights: tokenizer with the image's token, image processor, chat template,
generation settings. They give the token ids and pixels that training saw."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemo_pre.config.schema import ModelConfig
from nemo_pre.config.vision_families import FAMILIES, class_tokens, is_native, merge_size, token_pixels
from nemo_pre.data.conversation import (
    IMAGE_TAG,
    TEMPLATES,
    ChatTemplate,
    begins_with_bos,
    end_of_answer,
    marks_first_text_only,
)
from nemo_pre.huggingface.architecture import ARCHITECTURES
from nemo_pre.huggingface.importer import ORIGINAL
from nemo_pre.huggingface.pixels import FILTERS, NESTED, NESTED_KEY, OWN, fit_tower, read_pixels

QWEN_IMAGE_TAG = "<|image_pad|>"
RESAMPLE = {name: number for number, name in FILTERS.items()}
# Parts of a processor that transformers 5 writes into one file, and the files of their own that 4 reads.
FILES_OF_PARTS = {NESTED_KEY: OWN, "video_processor": "video_preprocessor_config.json"}


@dataclass(frozen=True)
class ImageTokens:
    """The token ids that stand for images in a prompt.

    Attributes:
        image: the id that stands for an image's visual tokens.
        markers: ids around every image; None where the chat template has none.
    """

    image: int
    markers: tuple[int, int] | None = None


def write_processor(saved: Any, model: ModelConfig, checkpoint: Path, directory: Path) -> ImageTokens:
    """Write every file of the directory but weights, ``config.json`` and card.

    A LLaVA or Qwen2.5-VL that was imported and not trained keeps its own files.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    original = checkpoint / ORIGINAL
    if original.is_dir():
        values = json.loads((original / "config.json").read_text())
        if values.get("model_type") in ARCHITECTURES:
            for path in sorted(original.iterdir()):
                if path.name not in ("config.json", "README.md"):
                    shutil.copyfile(path, directory / path.name)
            _keep_pixels(directory, model, saved.data)
            return _tokens_of(values)
    tag = QWEN_IMAGE_TAG if is_native(model.vision) else IMAGE_TAG
    tokenizer = _tokenizer(saved, model, tag)
    template = TEMPLATES[saved.data.chat_template]
    has_bos = _adds_bos(tokenizer) or begins_with_bos(template, tokenizer)
    chat_template = jinja_template(template, has_bos, tag, mark_behind_image(tokenizer, template))
    make = _native_processor if is_native(model.vision) else _processor
    processor = make(tokenizer, model, saved.data, chat_template)
    processor.save_pretrained(directory)
    if not (directory / OWN).exists():  # transformers 5 has it within another file, where 4 does not look
        processor.image_processor.save_pretrained(directory)
    _in_words_of_both(directory / "tokenizer_config.json")
    image_token_id = int(tokenizer.convert_tokens_to_ids(tag))
    _write_generation_config(tokenizer, saved.data.chat_template, image_token_id, directory)
    if not template.before_image:
        return ImageTokens(image_token_id)
    start, end = (tokenizer.convert_tokens_to_ids(marker) for marker in (template.before_image, template.after_image))
    return ImageTokens(image_token_id, (start, end))


def _in_words_of_both(path: Path) -> None:
    """Say what transformers 5 wrote of a tokenizer in words that 4 knows, and 5 too."""
    values = json.loads(path.read_text())
    if values.get("tokenizer_class") != "TokenizersBackend":
        return
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    values["additional_special_tokens"] = values.pop("extra_special_tokens", [])
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def _keep_pixels(directory: Path, model: ModelConfig, data: Any) -> None:
    """Put the image processor where ``transformers`` 4 looks for it too: the directory's own where it makes the
    checkpoint's pixels, else, as where it was imported with another, one that does."""
    keeps = _makes_pixels_of(directory, model, data)
    combined = directory / NESTED
    values = json.loads(combined.read_text()) if combined.is_file() else {}
    nested = {name: values.pop(name) for name in FILES_OF_PARTS if isinstance(values.get(name), dict)}
    if nested:
        combined.write_text(json.dumps(values, indent=2) + "\n")
    if NESTED_KEY in nested and is_native(model.vision):  # transformers 4 passes over the limits in size
        options = _native_options(model)
        nested[NESTED_KEY] |= {name: options[name] for name in ("min_pixels", "max_pixels")}
    for name, content in nested.items():
        if not (directory / FILES_OF_PARTS[name]).is_file():
            (directory / FILES_OF_PARTS[name]).write_text(json.dumps(content, indent=2) + "\n")
    if not keeps:
        make = _native_image_processor if is_native(model.vision) else image_processor
        make(model, data).save_pretrained(directory)


def _makes_pixels_of(directory: Path, model: ModelConfig, data: Any) -> bool:
    vision = replace(model.vision)
    try:
        found = fit_tower(read_pixels(directory, vision), vision)
    except ValueError:
        return False
    ways = (found.resize, found.image_filter, found.crop_from)
    return vision == model.vision and ways == (data.image_resize, data.image_filter, data.image_crop_from)


def _tokens_of(values: dict[str, Any]) -> ImageTokens:
    """The image tokens that an imported ``config.json`` names."""
    image = int(values["image_token_index" if "image_token_index" in values else "image_token_id"])
    start, end = values.get("vision_start_token_id"), values.get("vision_end_token_id")
    return ImageTokens(image) if start is None or end is None else ImageTokens(image, (int(start), int(end)))


def _tokenizer(saved: Any, model: ModelConfig, tag: str) -> Any:
    """The run's, with the tag that an image has in a text."""
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.tokenizer import load_tokenizer

    path = model.tokenizer or read_manifest(saved.data.path).tokenizer
    if path is None:
        raise ValueError(f"No tokenizer lies with {saved.data.path}, which the run was trained on: put it back there.")
    tokenizer = load_tokenizer(path)
    if tokenizer.convert_tokens_to_ids(tag) in (None, tokenizer.unk_token_id):
        # transformers 5 has another name for them, and for the second argument: keep those that are there.
        further = ("additional_special_tokens", "extra_special_tokens")
        name = next(each for each in further if each in tokenizer.SPECIAL_TOKENS_ATTRIBUTES or each is further[-1])
        tokenizer.add_special_tokens({name: [tag]}, False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    tokenizer.padding_side = "left"  # batches are for generation
    names = ["input_ids", "attention_mask"]  # no model of ours takes token types
    tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names
    return tokenizer


def _processor(tokenizer: Any, model: ModelConfig, data: Any, chat_template: str) -> Any:
    from transformers import LlavaProcessor

    vision = model.vision
    return LlavaProcessor(
        image_processor=image_processor(model, data),
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default" if vision.drop_class_token else "full",
        num_additional_image_tokens=class_tokens(vision),
        chat_template=chat_template,
    )


def _native_processor(tokenizer: Any, model: ModelConfig, data: Any, chat_template: str) -> Any:
    """Qwen2.5-VL's."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=_native_image_processor(model, data),
        tokenizer=_as_qwen2(tokenizer),
        video_processor=Qwen2VLVideoProcessor(**_native_options(model)),  # the class asks for one
        chat_template=chat_template,
    )


def _native_image_processor(model: ModelConfig, data: Any) -> Any:
    """The processor whose pixels and sizes are those of :mod:`nemo_pre.data.native_images`."""
    from transformers import Qwen2VLImageProcessor

    resample = RESAMPLE[data.image_filter]
    return Qwen2VLImageProcessor(resample=resample, do_convert_rgb=True, **_native_options(model))


def _native_options(model: ModelConfig) -> dict[str, Any]:
    vision, pixels = model.vision, token_pixels(model.vision) ** 2
    assert vision.min_visual_tokens is not None and vision.max_visual_tokens is not None
    return {
        "min_pixels": vision.min_visual_tokens * pixels,
        "max_pixels": vision.max_visual_tokens * pixels,
        "patch_size": vision.patch_size,
        "merge_size": merge_size(vision),
        "temporal_patch_size": FAMILIES[vision.family].must.get("temporal_patch_size", 1),
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
    }


def _as_qwen2(tokenizer: Any) -> Any:
    """Qwen2.5-VL's processor takes no tokenizer of another class; how it tokenizes is in ``tokenizer.json``."""
    from transformers import Qwen2TokenizerFast

    if isinstance(tokenizer, Qwen2TokenizerFast):
        return tokenizer
    special = {**tokenizer.special_tokens_map, "bos_token": tokenizer.bos_token, "unk_token": tokenizer.unk_token}
    names = {"model_input_names": tokenizer.model_input_names, "padding_side": tokenizer.padding_side}
    return Qwen2TokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, **special, **names)


def image_processor(model: ModelConfig, data: Any) -> Any:
    """The processor whose pixels are those of :mod:`nemo_pre.data.images`."""
    from transformers import CLIPImageProcessor, LlavaImageProcessor, SiglipImageProcessor

    vision = model.vision
    square = {"height": vision.image_size, "width": vision.image_size}
    how = {
        "image_mean": list(vision.image_mean),
        "image_std": list(vision.image_std),
        "resample": RESAMPLE[data.image_filter],
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
    short = {"crop_size": square, "do_center_crop": True}
    if data.image_resize == "crop":
        edge = data.image_crop_from or vision.image_size
        return CLIPImageProcessor(size={"shortest_edge": edge}, **short, **how)
    return LlavaImageProcessor(do_pad=True, size={"shortest_edge": vision.image_size}, **short, **how)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def mark_behind_image(tokenizer: Any, template: ChatTemplate) -> str:
    """What a text behind an image begins with so that it is tokenized as in training: a space becomes the word mark
    that the tokenizer puts before the first text of a sequence alone."""
    return " " if template.text_anew and marks_first_text_only(tokenizer) else ""


def jinja_template(
    template: ChatTemplate, tokenizer_adds_bos: bool, image_tag: str = IMAGE_TAG, behind_image: str = ""
) -> str:
    """Our chat template in the language of ``transformers``: contents are text, or lists of images and texts; an
    image is followed by a line break where text follows it, as in LLaVA's data."""
    bos = "" if tokenizer_adds_bos else "{{ bos_token if bos_token else '' }}"
    image = template.before_image + image_tag + template.after_image
    if template.image_first:
        question = _images_first(image_tag, image + behind_image)
    else:
        question = _trimmed(_as_written(template, image, image_tag), template)
    answer = _trimmed(
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}",
        template,
    )
    lead = template.before_answer + template.answer_lead + (behind_image if not template.keep_question else "")
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
        + _literal(lead)
        + answer
        + end
        + "{% else %}{{ raise_exception('Only user and assistant take part in a conversation.') }}"
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}"
        + _literal(template.before_answer)
        + "{% endif %}"
    )


def _as_written(template: ChatTemplate, image: str, image_tag: str) -> str:
    """A question's parts in their order; without its text where the template leaves that out."""
    if not template.keep_question:
        pieces = "message['content'].split(" + json.dumps(image_tag) + ")"
        return (
            "{% if message['content'] is string %}{{ " + json.dumps(image) + " * (" + pieces + " | length - 1) }}"
            "{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
            + _literal(image)
            + "{% endif %}{% endfor %}{% endif %}"
        )
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        + _literal(image)
        + r"{% if not loop.last %}{{ '\n' }}{% endif %}"
        + "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    )


def _images_first(image_tag: str, image: str) -> str:
    """All images of a question, a line break after each where something follows, and its text without the white space
    at its ends; a question without an image as it is."""
    tag = json.dumps(image_tag)
    return (
        "{% set asked = namespace(images=0, text='') %}{% if message['content'] is string %}"
        "{% set asked.images = message['content'].split(" + tag + ") | length - 1 %}"
        "{% set asked.text = message['content'] | replace(" + tag + ", '') %}{% else %}"
        "{% for part in message['content'] %}{% if part['type'] == 'image' %}"
        "{% set asked.images = asked.images + 1 %}{% elif part['type'] == 'text' %}"
        "{% set asked.text = asked.text + part['text'] %}{% endif %}{% endfor %}{% endif %}"
        "{% if asked.images %}{{ ([" + json.dumps(image) + "] * asked.images) | join('\\n') }}"
        "{% if asked.text | trim %}{{ '\\n' + asked.text | trim }}{% endif %}"
        "{% else %}{{ asked.text }}{% endif %}"
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
