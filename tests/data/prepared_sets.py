"""Small prepared sets, written sample by sample as data preparation writes them."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_prep.shards import write_shard
from nemo_pre.data.dataset import Preprocessing
from tests.data.tokenizers import qwen_like

SIZE, TILE_TOKENS = 16, 4


def image_bytes(value: int, kind: str = "PNG", size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A picture of one colour, which tells it from the others."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, kind)
    return file.getvalue()


def sample(key: str, images: Sequence[bytes] = (), question: str | None = None) -> tuple[str, dict[str, bytes]]:
    """One image is a member "png", several are "0.png", "1.png", ..."""
    names = ["png"] if len(images) == 1 else [f"{number}.png" for number in range(len(images))]
    record: dict[str, Any] = {
        "id": key,
        "source": "made",
        "conversations": [
            {"from": "human", "value": question or "<image>\n" * len(images) + "What is shown?"},
            {"from": "gpt", "value": f"Dogs {key}."},
        ],
    }
    if len(images) == 1:
        record["image"] = f"{key}.png"
    elif images:
        record["images"] = [f"{key}.{name}" for name in names]
    return key, {"json": json.dumps(record).encode(), **dict(zip(names, images, strict=True))}


def write_set(directory: Path, samples: Sequence[tuple[str, dict[str, bytes]]], per_shard: int = 8) -> Path:
    """The samples as a training split, the first of them also as a validation split."""
    directory.mkdir(parents=True)
    parts = {"train": samples, "val": samples[:1]}
    splits = {}
    for split, content in parts.items():
        starts = range(0, len(content), per_shard)
        shards = [
            write_shard(directory, f"{split}-{n:05d}", content[start : start + per_shard])
            for n, start in enumerate(starts)
        ]
        splits[split] = {"samples": len(content), "shards": shards}
    manifest = {"format": "nemo-pre shards", "format_version": 1, "dataset": directory.name, "splits": splits}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def text_set(directory: Path, name: str, count: int) -> Path:
    return write_set(directory / name, [sample(f"{name}-{number}") for number in range(count)])


def preprocessing(sequence_length: int = 120, **options: Any) -> Preprocessing:
    return Preprocessing(
        qwen_like(), "chatml", sequence_length - TILE_TOKENS + 1, TILE_TOKENS, SIZE, (0.0,) * 3, (1.0,) * 3, **options
    )
