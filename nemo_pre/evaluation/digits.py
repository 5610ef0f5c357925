"""The digit scenes' val split as a task of lmms-eval: a parquet file and the task's YAML beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo_pre.data.conversation import IMAGE_TAG
from nemo_pre.data.manifest import Manifest, read_manifest, verify_shards
from nemo_pre.data.shards import ShardedSamples

TASK = "digits"
TEMPLATE = Path(__file__).parent / "tasks" / "digits" / "digits_template.yaml"


def data_fingerprint(data: str) -> str:
    """Changes with the val split.

    Raises:
        ValueError: ``data`` holds no prepared data, or none for validation.
    """
    import hashlib

    shards = _val_split(data)[0].raw["splits"]["val"]["shards"]
    return hashlib.sha256(" ".join(shard["sha256"] for shard in shards).encode()).hexdigest()[:16]


def write_digits_task(data: str, directory: Path) -> Path:
    """Fill ``directory``, which lmms-eval takes as ``--include_path``; each sample with its first question.

    Raises:
        ValueError: as :func:`data_fingerprint`, or a sample cannot be read.
    """
    from datasets import Dataset, Features, Image, Value

    _, samples = _val_split(data)
    columns = {"key": Value("string"), "image": Image(), "question": Value("string")}
    columns |= {"answer": Value("string"), "question_type": Value("string")}
    rows = [_row(samples, position) for position in range(len(samples))]
    directory.mkdir(parents=True, exist_ok=True)
    file = (directory / "val.parquet").resolve()
    Dataset.from_list(rows, features=Features(columns)).to_parquet(str(file))
    task = {
        "task": TASK,
        "include": str(TEMPLATE.resolve()),
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"val": str(file)}},
    }
    (directory / "digits.yaml").write_text(json.dumps(task, indent=2) + "\n")  # JSON is YAML
    return directory


def _val_split(data: str) -> tuple[Manifest, ShardedSamples]:
    manifest = read_manifest(data, "data")
    if not manifest.shards.get("val"):
        raise ValueError(f"{manifest.directory} has no val shards: prepare the data again")
    verify_shards(manifest.shards["val"])
    return manifest, ShardedSamples(manifest.shards["val"])


def _row(samples: ShardedSamples, position: int) -> dict[str, Any]:
    raw = samples.read(position)
    question, answer = (message["value"] for message in raw.record["conversations"][:2])
    return {
        "key": raw.key,
        "image": None if raw.image is None else {"bytes": raw.image, "path": None},
        "question": question.replace(IMAGE_TAG, "").strip(),  # the chat template puts the image before it
        "answer": answer,
        "question_type": (raw.record.get("question_types") or ["all"])[0],
    }
