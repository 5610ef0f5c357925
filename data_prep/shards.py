"""Writing indexed WebDataset shards: plain tar files whose bytes depend on the samples alone.

Beside ``name.tar`` lies ``name.index.json``, a list of ``{"key", "members": {extension: [offset, size]}}``
in the tar's order, with which a reader reaches any sample by one seek. Both are written under a temporary name
and renamed when complete.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Sample = tuple[str, dict[str, bytes]]  # key without dots, {extension: content}


def write_shard(directory: Path, name: str, samples: Iterable[Sample]) -> dict[str, Any]:
    """Writes ``name.tar`` and its index into ``directory``; returns the shard's entry for the manifest."""
    tar_path, index_path = directory / f"{name}.tar", directory / f"{name}.index.json"
    unfinished = tar_path.with_name(tar_path.name + ".partial")
    index = []
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            assert "." not in key, f"WebDataset ends a key at its first dot: {key}"
            index.append({"key": key, "members": {ext: _add(tar, f"{key}.{ext}", members[ext]) for ext in members}})
    os.replace(unfinished, tar_path)
    write_whole(index_path, json.dumps(index, separators=(",", ":")).encode())
    return {
        "file": tar_path.name,
        "samples": len(index),
        "bytes": tar_path.stat().st_size,
        "sha256": _sha256(tar_path),
        "index": index_path.name,
        "index_bytes": index_path.stat().st_size,
        "index_sha256": _sha256(index_path),
    }


def write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def is_whole(directory: Path, entry: dict[str, Any]) -> bool:
    """Whether the files of a manifest's shard entry are there in the size it states."""
    files = ((entry["file"], entry["bytes"]), (entry["index"], entry["index_bytes"]))
    return all((directory / name).is_file() and (directory / name).stat().st_size == size for name, size in files)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> list[int]:
    """Appends a member whose header holds nothing of this machine or hour; returns its [offset, size]."""
    header = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the owner's names empty
    header.size = len(content)
    header.mode = 0o644
    offset = tar.offset + tarfile.BLOCKSIZE
    tar.addfile(header, io.BytesIO(content))
    return [offset, len(content)]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()
