"""Telling two exported models apart without reading all of their weights."""

from __future__ import annotations

import hashlib
from pathlib import Path

DESCRIBING = ("*.json", "*.jinja", "*.py", "*.model")  # configuration, tokenizer, template, code; not the model card
SAMPLES, SAMPLE_BYTES = 32, 4096


def model_fingerprint(directory: Path) -> str:
    """A digest of every file that describes the model, and of each weight file's size, header and 32 places in it: two
    steps of one training have equal sizes.

    Raises:
        ValueError: ``directory`` holds no exported model.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").is_file() or not weights:
        raise ValueError(f"{directory} is not an exported model: it needs config.json and *.safetensors.")
    digest = hashlib.sha256()
    for path in sorted(path for pattern in DESCRIBING for path in directory.glob(pattern)):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode() + path.read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for number in range(SAMPLES):
                file.seek(number * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:16]
