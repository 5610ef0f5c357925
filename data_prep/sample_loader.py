"""Energon's VQASample of a nemo-pre sample. This file is copied into the .nv-meta folder of a dataset.

``image``: a float tensor [3, height, width] in 0..1, a list of them where a sample has several images, None where it
has none. ``context`` and ``answers``: the questions, with their <image> tags, and the answers, turn by turn.
"""

import io
import re
from typing import Any

IMAGE = re.compile(r"(?:(\d+)\.)?(?:jpg|jpeg|png|webp)")


def sample_loader(raw: dict[str, Any]) -> dict[str, Any]:
    turns = raw["json"]["conversations"]
    parts = sorted((int(match[1] or 0), part) for part in raw if (match := IMAGE.fullmatch(part)))
    images = [_tensor(raw[part]) for _, part in parts]
    return {
        "image": images[0] if len(images) == 1 else images or None,
        "context": [turn["value"] for turn in turns if turn["from"] == "human"],
        "answers": [turn["value"] for turn in turns if turn["from"] == "gpt"],
    }


def part_filter(part: str) -> bool:
    return part == "json" or IMAGE.fullmatch(part) is not None


def _tensor(image: Any) -> Any:
    """Energon decodes JPEG and PNG itself and leaves WebP as bytes."""
    if not isinstance(image, bytes):
        return image
    import numpy as np
    import torch
    from PIL import Image

    pixels = np.array(Image.open(io.BytesIO(image)).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255.0
