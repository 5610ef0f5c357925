"""What makes a folder of shards a Megatron-Energon dataset (version 5.2), beside each tar's own index.

Energon's own preparator (``WebdatasetPreparator.prepare_dataset``) reads every tar again to find what is known here,
leaves a shard out that it cannot read, and imports torch into every process. So the same bytes are written here:
``.nv-meta/.info.yaml`` and ``split.yaml`` (and ``NAME.tar.idx``, by :class:`data_prep.shards.ShardWriter`).
``dataset.yaml`` names ``sample_loader.py``, which turns a conversation into Energon's VQASample.

Energon's commands ask for the splits train, val and test unless they are told otherwise, and ``energon lint`` ends
with a traceback at one that is not there or has no shards. So a split without shards has one without samples.
"""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

import yaml

from data_prep.shards import energon_index, write_whole

FOLDER = ".nv-meta"
LOADER = "sample_loader.py"
EMPTY = f"{FOLDER}/empty.tar"
SPLITS = ("train", "val", "test")  # that Energon's commands ask for


def write_metadata(out: Path, splits: dict[str, Any]) -> None:
    """Make ``out``, whose shards are complete, a dataset of Energon's; ``splits`` are the manifest's."""
    (out / FOLDER).mkdir(exist_ok=True)
    for file, content in metadata_files(splits).items():
        write_whole(out / file, content)


def is_energons(out: Path, splits: dict[str, Any]) -> bool:
    """Whether all that :func:`write_metadata` writes is there."""
    return all((out / file).is_file() for file in metadata_files(splits))


def metadata_files(splits: dict[str, Any]) -> dict[str, bytes]:
    """Content by name below OUT, for the manifest's ``splits``."""
    shards = {split: content["shards"] for split, content in splits.items()}
    counts = {entry["file"]: entry["samples"] for entries in shards.values() for entry in entries}
    files = {split: [entry["file"] for entry in shards.get(split, [])] for split in (*SPLITS, *shards)}
    parts = {split: names or [EMPTY] for split, names in files.items()}
    if [EMPTY] in parts.values():
        counts[EMPTY] = 0
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
        EMPTY: bytes(tarfile.RECORDSIZE),
        energon_index(EMPTY): bytes(8),  # the end, where a first sample would start
    }
