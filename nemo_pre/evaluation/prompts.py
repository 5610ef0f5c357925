"""Turning an lmms-eval question into a message for a processor's chat template."""

from __future__ import annotations

from typing import Any

from nemo_pre.data.conversation import IMAGE_TAG


def chat_message(question: str, num_images: int) -> dict[str, Any]:
    """The user's message: images where the question has a tag for each, otherwise all before the text."""
    pieces = question.split(IMAGE_TAG)
    if len(pieces) - 1 != num_images:
        pieces = [""] * num_images + ["".join(pieces)]
    content: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        if number:
            content.append({"type": "image"})
            piece = piece.removeprefix("\n")  # templates put one after an image
        if piece:
            content.append({"type": "text", "text": piece})
    return {"role": "user", "content": content}
