"""What makes a folder of shards a Megatron-Energon dataset (version 5.2).

Energon's own preparator (``WebdatasetPreparator.prepare_dataset``) reads every tar again to find what is known here,
leaves a shard out that it cannot read, and imports torch into every process. So the same bytes are written here:
``NAME.tar.idx`` (the offset of each sample and the end, 8 bytes each), ``.nv-meta/.info.yaml`` and ``split.yaml``.
``dataset.yaml`` names ``sample_loader.py``, which turns a conversation into Energon's VQASample.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import yaml

from data_prep.shards import ShardWriter, write_whole

FOLDER = ".nv-meta"
LOADER = "sample_loader.py"


def tar_index_name(tar: str) -> str:
    return f"{tar}.idx"


def write_tar_index(writer: ShardWriter) -> None:
    """The index of a finished tar."""
    path = writer.tar_path.with_name(tar_index_name(writer.tar_path.name))
    last = writer.index[-1]["members"].values()
    offset, size = max(last)
    end = offset + size + -size % 512  # where the tar's closing zeros begin
    offsets = [*writer.starts, end]
    write_whole(path, struct.pack(f"<{len(offsets)}Q", *offsets))


def metadata_files(splits: dict[str, Any]) -> dict[str, bytes]:
    """Content by name below OUT, for the manifest's ``splits``."""
    shards = {split: content["shards"] for split, content in splits.items()}
    counts = {entry["file"]: entry["samples"] for entries in shards.values() for entry in entries}
    parts = {split: [entry["file"] for entry in entries] for split, entries in shards.items()}
    dataset = {
        "sample_type": {"__module__": "megatron.energon", "__class__": "VQASample"},
        "sample_loader": f"{LOADER}:sample_loader",
        "part_filter": f"{LOADER}:part_filter",
    }
    return {
        f"{FOLDER}/.info.yaml": yaml.dump({"shard_counts": counts}).encode(),
        f"{FOLDER}/split.yaml": yaml.dump({"exclude": [], "split_parts": parts}).encode(),
        f"{FOLDER}/dataset.yaml": yaml.dump(dataset, sort_keys=False).encode(),
        f"{FOLDER}/{LOADER}": (Path(__file__).parent / LOADER).read_bytes(),
    }
