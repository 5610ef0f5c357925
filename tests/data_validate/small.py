"""A dataset of eight samples, small enough to be broken in every place."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.shards import Sample, write_shard
from nemo_pre.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST


def picture(seed: int, kind: str, side: int = 24) -> bytes:
    """Colours that change slowly, and a little noise."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.clip(np.asarray(coarse, np.int16) + rng.integers(-4, 5, (side, side, 3)), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def record(question: str = "<image>\nhow many digits are there ?", answer: str = "3", **other: Any) -> bytes:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"conversations": turns, **other}).encode()


def samples(split: str) -> list[Sample]:
    """One PNG with a mask, one JPEG, two images, and text alone."""
    seed = {"train": 0, "val": 100}[split]
    mask = io.BytesIO()
    Image.fromarray(np.eye(24, dtype=np.uint8)).save(mask, "PNG")
    return [
        (f"{split}-0", {"png": picture(seed, "PNG"), "mask.png": mask.getvalue(), "json": record(image="0.png")}),
        (f"{split}-1", {"jpg": picture(seed + 1, "JPEG"), "json": record(image="coco/1.jpg")}),
        (
            f"{split}-2",
            {
                "0.jpg": picture(seed + 2, "JPEG"),
                "1.webp": picture(seed + 3, "WEBP"),
                "json": record("<image>\n<image>\nhow many digits are there ?", image=["2a.jpg", "2b.webp"]),
            },
        ),
        (f"{split}-3", {"json": record("what is 2 plus 1 ?")}),
    ]


def write(out: Path, by_split: dict[str, list[Sample]] | None = None) -> Path:
    by_split = by_split or {split: samples(split) for split in ("train", "val")}
    out.mkdir(parents=True, exist_ok=True)
    splits = {
        split: {"samples": len(content), "shards": [write_shard(out, f"{split}-00000", content)]}
        for split, content in by_split.items()
    }
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "dataset": "small", "tokenizer": None}
    manifest["splits"] = splits
    (out / MANIFEST).write_text(json.dumps(manifest))
    return out


def seal(out: Path) -> None:
    """Makes the manifest agree with the sizes and checksums of the files as they are now."""
    manifest = json.loads((out / MANIFEST).read_text())
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            for file, kind in (("file", ""), ("index", "index_")):
                content = (out / entry[file]).read_bytes()
                entry[f"{kind}bytes"], entry[f"{kind}sha256"] = len(content), hashlib.sha256(content).hexdigest()
    (out / MANIFEST).write_text(json.dumps(manifest))


def edit(file: Path, change: Callable[[bytes], bytes]) -> None:
    file.write_bytes(change(file.read_bytes()))
