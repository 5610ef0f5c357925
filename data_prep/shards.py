"""Writing indexed WebDataset shards: plain tar files whose bytes depend on the samples alone.

Beside ``name.tar`` lies ``name.index.json``, a list of ``{"key", "members": {extension: [offset, size]}}``
in the tar's order, with which a reader reaches any sample by one seek, and ``name.tar.idx``, Megatron-Energon's index
(where each sample starts and the last one ends, 8 bytes each). All are written under a temporary name and renamed
when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Sample = tuple[str, dict[str, bytes]]  # key without dots, {extension: content}


class ShardWriter:
    """Writes ``name.tar`` into ``directory``, sample by sample, and its indices when it is finished.

    ``bytes`` counts what the samples take so far; ``starts`` holds the offset of each sample's first header.
    """

    def __init__(self, directory: Path, name: str):
        self.tar_path, self.index_path = directory / f"{name}.tar", directory / f"{name}.index.json"
        self.unfinished = self.tar_path.with_name(self.tar_path.name + ".partial")
        self.file = self.unfinished.open("wb")
        self.digest = hashlib.sha256()
        self.bytes = 0
        self.index: list[dict[str, Any]] = []
        self.starts: list[int] = []

    def add(self, key: str, members: dict[str, bytes], **facts: Any) -> None:
        """Appends a sample; ``facts`` go into its index entry, beside the places of its members."""
        assert "." not in key, f"WebDataset ends a key at its first dot: {key}"
        self.starts.append(self.bytes)
        places = {ext: self._append(f"{key}.{ext}", content) for ext, content in members.items()}
        self.index.append({"key": key, "members": places, **facts})

    def finish(self) -> dict[str, Any]:
        """Completes the tar and writes its indices; returns the shard's entry for the manifest."""
        offsets = [*self.starts, self.bytes]  # before the tar's closing zeros
        end = 2 * tarfile.BLOCKSIZE
        self._write(bytes(end + -(self.bytes + end) % tarfile.RECORDSIZE))
        self.file.close()
        os.replace(self.unfinished, self.tar_path)
        index = json.dumps(self.index, separators=(",", ":")).encode()
        write_whole(self.index_path, index)
        energon = self.tar_path.with_name(energon_index(self.tar_path.name))
        write_whole(energon, struct.pack(f"<{len(offsets)}Q", *offsets))
        return {
            "file": self.tar_path.name,
            "samples": len(self.index),
            "bytes": self.bytes,
            "sha256": self.digest.hexdigest(),
            "index": self.index_path.name,
            "index_bytes": len(index),
            "index_sha256": hashlib.sha256(index).hexdigest(),
        }

    def _append(self, name: str, content: bytes) -> list[int]:
        """Appends a member whose header holds nothing of this machine or hour; returns its [offset, size]."""
        header = tarfile.TarInfo(name)  # mtime, uid and gid are 0 and the owner's names empty
        header.size = len(content)
        header.mode = 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.bytes
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return [offset, len(content)]

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.bytes += len(content)


def write_shard(directory: Path, name: str, samples: Iterable[Sample]) -> dict[str, Any]:
    """Writes ``name.tar`` and its indices into ``directory``; returns the shard's entry for the manifest."""
    writer = ShardWriter(directory, name)
    with writer.file:
        for key, members in samples:
            writer.add(key, members)
        return writer.finish()


def energon_index(tar: str) -> str:
    """The name of Energon's index of a tar."""
    return f"{tar}.idx"


def member_bytes(content: bytes) -> int:
    """What a member of this content takes in a tar: its header and whole blocks."""
    return tarfile.BLOCKSIZE + len(content) + -len(content) % tarfile.BLOCKSIZE


def write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)


def is_whole(directory: Path, entry: dict[str, Any]) -> bool:
    """Whether the files of a manifest's shard entry are there in the size it states."""
    files = (
        (entry["file"], entry["bytes"]),
        (entry["index"], entry["index_bytes"]),
        (energon_index(entry["file"]), 8 * (entry["samples"] + 1)),
    )
    return all((directory / name).is_file() and (directory / name).stat().st_size == size for name, size in files)
