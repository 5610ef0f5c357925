"""Writing a directory of features: what it will hold first, then file by file."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from nemo_pre.data.features import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    TOWER,
    UNREADABLE,
    FeatureFile,
    FeaturesManifest,
    read_features,
)
from nemo_pre.features.tower import digests
from nemo_pre.features.work import Wanted

LOCK = "features.lock"


@dataclass
class ShardFeatures:
    """The file of one shard being written, image by image, under a name of its own until it is complete.

    Used in a ``with`` statement; without :meth:`finish` before its end what was written is of no use.

    Args:
        images_of_samples: how many each sample of the shard has.

    Raises:
        BlockingIOError: another process is writing it.
    """

    file: FeatureFile
    images_of_samples: list[int]
    _checksums: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert sum(self.images_of_samples) == self.file.images
        self._path = partial_path(self.file)
        self._out = os.fdopen(os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        _lock(self._out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Between opening and locking another process may have completed the file, which then has its own name.
        if not self._path.exists() or os.fstat(self._out.fileno()).st_ino != self._path.stat().st_ino:
            raise BlockingIOError(f"{self.file.path} was written meanwhile")
        self._out.truncate(0)
        self._out.write(self.file.header)
        self._out.write(np.array(list(accumulate(self.images_of_samples)), "<i8").tobytes())
        self._out.write(bytes(8 * self.file.images))

    def add(self, features: Tensor) -> None:
        """The next images' ``[images, tokens, width]``, on the CPU and in the file's type."""
        for image in features:
            assert (
                image.shape == (self.file.tokens, self.file.width) and str(image.dtype) == f"torch.{self.file.dtype}"
            )
            content = image.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            self._checksums.append(zlib.crc32(content))
            self._out.write(content)

    def add_unreadable(self, images: int) -> None:
        for _ in range(images):
            self._checksums.append(UNREADABLE)
            self._out.write(bytes(self.file.image_bytes))

    def finish(self) -> None:
        """Flush the file to the disk and give it its name."""
        assert len(self._checksums) == self.file.images
        self._out.seek(self.file.checksums_at)
        self._out.write(np.array(self._checksums, "<i8").tobytes())
        self._out.flush()
        os.fsync(self._out.fileno())
        os.replace(self._path, self.file.path)

    def __enter__(self) -> ShardFeatures:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self._out.close()


def partial_path(file: FeatureFile) -> Path:
    return file.path.with_name(file.path.name + ".partial")


def claim(
    wanted: Wanted,
    dtype: str,
    described: dict[str, Any],
    tower: dict[str, Tensor],
    source: str,
    files: list[FeatureFile],
) -> FeaturesManifest:
    """Write the manifest, and of the run's encoder the weights, which its checkpoints need; or add the shards to a
    manifest that is there.

    Args:
        source: where the weights are from, for messages.

    Raises:
        ValueError: the directory holds features of another model, preprocessing or type.
    """
    directory = wanted.directory
    directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory / LOCK):
        sums = digests(tower)
        if (directory / MANIFEST).exists():
            _check_same(read_features(directory, wanted.option), dtype, described, sums)
            raw = json.loads((directory / MANIFEST).read_text())
        else:
            kept = {} if wanted.target else {"bytes": _write_tower(directory / TOWER, tower)}
            raw = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "dtype": dtype,
                "tokens": files[0].tokens,
                "width": files[0].width,
                "described": described,
                "tower": {**sums, **kept, "source": source},
                "shards": {},
            }
        for file in files:
            entry = {"file": file.path.name, "samples": file.samples, "images": file.images, "bytes": file.bytes}
            raw["shards"].setdefault(file.shard_sha256, entry)
        _write_whole(directory / MANIFEST, json.dumps(raw, indent=1).encode())
    return read_features(directory, wanted.option)


def _check_same(found: FeaturesManifest, dtype: str, described: dict[str, Any], sums: dict[str, str]) -> None:
    differing = [name for name, value in described.items() if found.described.get(name) != value]
    differing += ["dtype"] if found.dtype != dtype else []
    differing += ["the weights"] if found.tower["float32"] != sums["float32"] else []
    if differing:
        raise ValueError(
            f"{found.option}={found.directory} holds features with another {', '.join(differing)}: name another "
            f"directory, or remove it."
        )


def _write_tower(path: Path, tower: dict[str, Tensor]) -> int:
    from safetensors.torch import save

    content = save({name: tensor.contiguous() for name, tensor in tower.items()}, {"format": "pt"})
    _write_whole(path, content)
    return len(content)


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".partial")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        _lock(file, fcntl.LOCK_EX)
        yield


def _lock(file: IO[Any], how: int) -> None:
    """Lock the file, where its file system has locks.

    Raises:
        BlockingIOError: another process has it, and this one is not to wait.
    """
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
            raise
