"""LLaVA-style JSON or JSONL with a folder of images.

LLaVA-Pretrain (https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain): ``blip_laion_cc_sbu_558k.json`` is an
array of {"id", "image": "00453/004539375.jpg", "conversations": [{"from": "human"|"gpt", "value"}]}, and
``images.zip`` unpacks to the folders the images are named in. LLaVA-Instruct's ``llava_v1_5_mix665k.json`` is the
same, with text-only records that have no "image", and images named below the folder that holds coco, gqa, ocr_vqa,
textvqa and vg. "image" may be a list, as in the multi-image sets of LLaVA-NeXT.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.prepare.arrays import mapped_array
from data_prep.prepare.candidate import BadSample, Candidate, read_inside
from data_prep.prepare.json_records import find_records

PROBED_RECORDS = 1000  # looked at to find out what the image paths are relative to


@dataclass(frozen=True)
class LlavaRecords:
    file: Path
    images: Path
    index: Path  # int64 [rows, 2]: start and size of each record in bytes
    rows: int
    sha256: str

    @classmethod
    def open(cls, path: Path, images: Path | None, scratch: Path) -> LlavaRecords:
        file = annotation_file(path)
        places, sha256 = find_records(file)
        index = scratch.with_suffix(".npy")
        np.save(index, np.frombuffer(places, dtype=np.int64).reshape(-1, 2))
        records = cls(file, images or file.parent, index, len(places) // 2, sha256)
        if images is None and (file.parent / "images").is_dir() and not records._finds_images():
            records = cls(file, file.parent / "images", index, len(places) // 2, sha256)
        return records

    def fingerprint(self) -> dict[str, Any]:
        return {"file": self.file.name, "sha256": self.sha256}

    def origin(self, row: int) -> str:
        return f"{self.file.name}[{row}]"

    def read(self, row: int) -> Candidate:
        try:
            record = json.loads(self._record(row))
        except (ValueError, RecursionError) as error:
            raise BadSample("broken_record", str(error)) from error
        if not isinstance(record, dict):
            raise BadSample("broken_record", f"a {type(record).__name__} instead of an object")
        images = _image_names(record)
        return Candidate(
            id=str(record.get("id", row)),
            conversations=record.get("conversations"),
            images=images,
            load=lambda number: read_inside(self.images, images[number]),
        )

    def _record(self, row: int) -> bytes:
        start, size = mapped_array(self.index)[row].tolist()
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, start)
        finally:
            os.close(descriptor)

    def _finds_images(self) -> bool:
        """Whether the first image that a record names is there."""
        for row in range(min(self.rows, PROBED_RECORDS)):
            try:
                candidate = self.read(row)
                if candidate.images:
                    candidate.load(0)
                    return True
            except BadSample as error:
                if error.reason == "missing_image":
                    return False
        return True


def annotation_file(path: Path) -> Path:
    """The JSON file meant by ``path``, a file or a folder that holds one."""
    if path.is_file():
        return path
    files = sorted(file for suffix in ("*.json", "*.jsonl") for file in path.glob(suffix))
    files = [file for file in files if not file.stem.endswith("_meta")]  # beside LLaVA-Pretrain's conversations
    if len(files) != 1:
        raise ValueError(f"{path} holds {len(files)} JSON files: name the one with the conversations")
    return files[0]


def _image_names(record: dict[str, Any]) -> list[str]:
    names = record.get("image") or record.get("images") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise BadSample("broken_record", "its image is neither a path nor a list of paths")
    return names
