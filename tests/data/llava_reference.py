"""LLaVA-1.5's published procedure from a record to ids and labels, written anew without torch.

Source: github.com/haotian-liu/LLaVA, ``llava/train/train.py`` (``preprocess_multimodal``, ``preprocess_v1``,
``preprocess_plain``), ``llava/mm_utils.py`` (``tokenizer_image_token``), ``llava/conversation.py`` (``vicuna_v1``,
``plain``), as used by ``scripts/v1_5`` with the slow tokenizer: one image, no start and end tokens around it.
"""

from __future__ import annotations

from typing import Any

IMAGE, IMAGE_INDEX, IGNORE = "<image>", -200, -100
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
Messages = list[dict[str, str]]


def tokenizer_image_token(prompt: str, tokenizer: Any) -> list[int]:
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split(IMAGE)]
    offset = 1 if chunks[0] and chunks[0][0] == tokenizer.bos_token_id else 0
    ids = chunks[0][:offset]
    for number, chunk in enumerate(chunks):
        ids += ([IMAGE_INDEX] if number else []) + chunk[offset:]
    return ids


def images_first(messages: Messages) -> Messages:
    """``preprocess_multimodal``, which is for samples with an image alone."""
    moved = []
    for message in messages:
        value = message["value"]
        if IMAGE in value:
            value = (IMAGE + "\n" + value.replace(IMAGE, "").strip()).strip()
        moved.append({**message, "value": value})
    return moved


def prompt_of(messages: Messages) -> str:
    """``vicuna_v1``'s text; a last question is followed by what asks for an answer."""
    text = SYSTEM + " "
    for number, message in enumerate(messages):
        role, end = (("USER", " "), ("ASSISTANT", "</s>"))[number % 2]
        text += f"{role}: {message['value']}{end}" if message["value"] else f"{role}:"
    return text


def preprocess_v1(messages: Messages, tokenizer: Any, has_image: bool) -> tuple[list[int], list[int], bool]:
    """Ids, labels (of the token at their own place), and whether LLaVA warns of a mismatch and trains on nothing."""
    messages = images_first(messages) if has_image else messages
    if messages[0]["from"] != "human":
        messages = messages[1:]
    text = prompt_of(messages)

    def ids_of(part: str) -> list[int]:
        return tokenizer_image_token(part, tokenizer) if has_image else tokenizer(part).input_ids

    ids = ids_of(text)
    if not has_image:
        ids = ids[: tokenizer.model_max_length]
    labels, position = list(ids), 1
    labels[:1] = [IGNORE]
    for number, part in enumerate(text.split("</s>")):
        if part == "":
            break
        halves = part.split(" ASSISTANT: ")
        if len(halves) != 2:
            break
        length, instruction = len(ids_of(part)), len(ids_of(halves[0] + " ASSISTANT: ")) - 2
        if number and not tokenizer.legacy:
            length, instruction = length - 1, instruction - 1
        labels[position : position + instruction] = [IGNORE] * len(labels[position : position + instruction])
        position += length
    labels[position:] = [IGNORE] * len(labels[position:])
    mismatch = position < tokenizer.model_max_length and position != len(ids)
    return ids, [IGNORE] * len(ids) if mismatch else labels, mismatch


def preprocess_plain(messages: Messages, tokenizer: Any) -> tuple[list[int], list[int]]:
    question, answer = messages
    assert IMAGE in question["value"]
    ids = tokenizer_image_token(IMAGE + answer["value"] + "\n", tokenizer)
    masked = len(tokenizer_image_token(IMAGE, tokenizer))
    return ids, [IGNORE] * masked + ids[masked:]


def generation_prompt(question: str, tokenizer: Any) -> list[int]:
    """``llava/eval/model_vqa_loader.py``: what a model is asked with."""
    messages = [{"from": "human", "value": f"{IMAGE}\n{question}"}]
    return tokenizer_image_token(prompt_of(messages) + "ASSISTANT:", tokenizer)
