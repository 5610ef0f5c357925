"""The manifest that data preparation leaves in a data directory.

Nothing heavy is imported here: ``nemo-pre train dry_run=true`` and data preparation both use it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = "nemo-pre shards"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Shard:
    """A tar file of samples and the index that tells where each lies; sizes in bytes."""

    path: Path
    index_path: Path
    samples: int
    bytes: int
    index_bytes: int
    sha256: str  # of the tar


@dataclass(frozen=True)
class Manifest:
    directory: Path
    dataset: str
    shards: dict[str, list[Shard]]  # by split
    fingerprint: str  # changes with the training samples; a resumed run must find the same
    tokenizer: Path | None
    raw: dict[str, Any]

    def num_samples(self, split: str) -> int:
        return sum(shard.samples for shard in self.shards[split])


def read_manifest(path: str | Path, option: str = "data.path") -> Manifest:
    """Parses ``path/manifest.json``.

    Args:
        option: which named the directory.

    Raises:
        ValueError: there is none, or it is not one of this format.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{option}={directory} has no {MANIFEST}: prepare the data first with nemo-pre data prepare, "
            f"or the demo's with nemo-pre data demo out={directory}"
        )
    try:
        raw = json.loads(file.read_text())
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it states format {raw['format']!r} version {raw['format_version']!r}")
        shards = {
            split: [
                Shard(
                    path=directory / entry["file"],
                    index_path=directory / entry["index"],
                    samples=int(entry["samples"]),
                    bytes=int(entry["bytes"]),
                    index_bytes=int(entry["index_bytes"]),
                    sha256=str(entry["sha256"]),
                )
                for entry in content["shards"]
            ]
            for split, content in raw["splits"].items()
        }
        tokenizer = directory / raw["tokenizer"] if raw.get("tokenizer") else None
        fingerprint = " ".join(entry["sha256"][:16] for entry in raw["splits"]["train"]["shards"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(
            f"{file} is not a manifest of {FORMAT} version {FORMAT_VERSION} ({error!r}): prepare the data again"
        ) from error
    return Manifest(directory, str(raw.get("dataset", "")), shards, _short(fingerprint), tokenizer, raw)


def verify_shards(shards: list[Shard], tolerate_wrong_size: bool = False) -> None:
    """Checks that every shard and index is there, in the size the manifest states.

    Raises:
        ValueError: naming the first file that is missing or, unless tolerated for the tar, of another size.
    """
    for shard in shards:
        for file, size in ((shard.path, shard.bytes), (shard.index_path, shard.index_bytes)):
            if not os.path.isfile(file):  # unlike Path.is_file, also False where the name is too long
                raise ValueError(f"{file} is named in the manifest but missing: prepare the data again")
            found = file.stat().st_size
            if found != size and not (tolerate_wrong_size and file == shard.path):
                raise ValueError(f"{file} has {found} bytes where the manifest says {size}: prepare the data again")


def check_training_size(manifests: Sequence[Manifest], global_batch_size: int) -> None:
    """Checks that a global batch is not larger than what there is to train on.

    Raises:
        ValueError: it is.
    """
    found = sum(manifest.num_samples("train") for manifest in manifests if "train" in manifest.shards)
    if found < global_batch_size:
        raise ValueError(
            f"{', '.join(str(manifest.directory) for manifest in manifests)} has {found} training samples but "
            f"trainer.global_batch_size={global_batch_size}: prepare {global_batch_size - found} more or lower it to "
            f"{found}"
        )


def _short(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()[:16]
