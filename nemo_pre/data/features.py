"""Outputs of frozen vision models, read instead of computed; ``nemo-pre data features`` writes them.

They are the run's encoder's (``data.features``, read in the place of images) or those of a model that an objective
compares visual tokens with. A directory holds ``features.json`` (of which model, preprocessing and shards), of the
encoder its weights, and a safetensors file per shard with three tensors:

- ``image_ends`` int64 ``[samples]``: sample i of the shard has images ``image_ends[i - 1]`` to ``image_ends[i] - 1``;
- ``crc32`` int64 ``[images]``: of each image's features, or :data:`UNREADABLE`;
- ``features`` ``[images, tokens, width]``: what enters the projector, or what visual tokens are compared with.

They are read by position and not mapped into memory: a file that is cut while a run reads it would end the process.
"""

from __future__ import annotations

import bisect
import json
import os
import zlib
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import Shard
from nemo_pre.data.shards import OpenFile, open_file

if TYPE_CHECKING:
    import torch

MANIFEST, TOWER = "features.json", "tower.safetensors"
FORMAT, FORMAT_VERSION = "nemo-pre features", 1
DTYPES = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}  # safetensors' name, bytes
UNREADABLE = -1  # the image could not be decoded when features were computed
AGAIN = "compute it with nemo-pre data features and the options of this run"


@dataclass(frozen=True)
class FeatureFile:
    """The features of one shard: where they lie and how.

    Attributes:
        path: of the file.
        shard_sha256: of the tar whose images they are of.
        tokens, width: of an image's features.
        dtype: of :data:`DTYPES`.
    """

    path: Path
    shard_sha256: str
    samples: int
    images: int
    tokens: int
    width: int
    dtype: str

    @cached_property
    def header(self) -> bytes:
        """What a safetensors file begins with, padded to a multiple of 8 bytes."""
        name, _ = DTYPES[self.dtype]
        shapes = {
            "image_ends": ("I64", [self.samples], 8 * self.samples),
            "crc32": ("I64", [self.images], 8 * self.images),
            "features": (name, [self.images, self.tokens, self.width], self.images * self.image_bytes),
        }
        entries: dict[str, Any] = {"__metadata__": {"shard_sha256": self.shard_sha256}}
        start = 0
        for tensor, (dtype, shape, size) in shapes.items():
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [start, start + size]}
            start += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def image_bytes(self) -> int:
        return self.tokens * self.width * DTYPES[self.dtype][1]

    @property
    def checksums_at(self) -> int:
        return len(self.header) + 8 * self.samples

    @property
    def features_at(self) -> int:
        return self.checksums_at + 8 * self.images

    @property
    def bytes(self) -> int:
        """Bytes of the whole file."""
        return self.features_at + self.images * self.image_bytes

    @property
    def is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.bytes

    def verify(self) -> None:
        """Compare the file's size with what its header promises.

        Raises:
            ValueError: the file is missing or cut, with the place where it ends.
        """
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing: {AGAIN}.")
        found = self.path.stat().st_size
        if found != self.bytes:
            image = max(found - self.features_at, 0) // self.image_bytes
            where = f"it ends at image {image} of {self.images}" if found < self.bytes else "it goes on behind its end"
            raise ValueError(f"{self.path} has {found} bytes instead of {self.bytes}, {where}: remove it and {AGAIN}.")


@dataclass(frozen=True)
class FeaturesManifest:
    """What ``features.json`` says.

    Attributes:
        option: the option of a run that names the directory.
        tokens, width: of an image's features.
        described: by option of a run, what the features depend on beside the weights.
        tower: ``float32`` and ``bfloat16``, the sha256 of the weights in that type, ``source``, where they are from,
            and of the run's encoder ``bytes`` of their file.
        files: by the sha256 of the shard.
    """

    directory: Path
    option: str
    dtype: str
    tokens: int
    width: int
    described: dict[str, Any]
    tower: dict[str, Any]
    files: dict[str, FeatureFile]

    def file_of(self, shard: Shard) -> FeatureFile:
        """The file with the features of a shard's images.

        Raises:
            ValueError: no features of this shard were computed.
        """
        if shard.sha256 not in self.files:
            raise ValueError(f"{self.option}={self.directory} has no features of {shard.path}: {AGAIN}.")
        file = self.files[shard.sha256]
        if file.samples != shard.samples:
            raise ValueError(
                f"{file.path} has features of {file.samples} samples where {shard.path} has {shard.samples}: "
                f"prepare the data again."
            )
        return file


def read_features(directory: str | Path, option: str = "data.features") -> FeaturesManifest:
    """The manifest of the features in ``directory``.

    Args:
        option: of the run, which names the directory.

    Raises:
        ValueError: there are no features, or not of this format.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    try:
        raw = json.loads(path.read_text())
        if raw["format"] != FORMAT or raw["format_version"] != FORMAT_VERSION:
            raise ValueError(f"it states format {raw['format']!r} version {raw['format_version']!r}")
        if raw["dtype"] not in DTYPES:
            raise ValueError(f"it states the type {raw['dtype']!r}")
        shape = (int(raw["tokens"]), int(raw["width"]), str(raw["dtype"]))
        files = {
            digest: FeatureFile(directory / entry["file"], digest, int(entry["samples"]), int(entry["images"]), *shape)
            for digest, entry in raw["shards"].items()
        }
        described, tower = dict(raw["described"]), dict(raw["tower"])
        found = FeaturesManifest(directory, option, raw["dtype"], *shape[:2], described, tower, files)
    except FileNotFoundError as error:
        raise ValueError(f"{option}={directory} has no {MANIFEST}: {AGAIN}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a manifest of {FORMAT} version {FORMAT_VERSION} ({error!r}): name another directory."
        ) from error
    return found


class CachedFeatures:
    """The features of the samples of ``shards``, numbered as :class:`~nemo_pre.data.shards.ShardedSamples` does.

    Raises:
        ValueError: a shard has none, or a file is missing or cut.
    """

    def __init__(self, directory: str | Path, shards: list[Shard], option: str = "data.features") -> None:
        manifest = read_features(directory, option)
        self.files = [manifest.file_of(shard) for shard in shards]
        for file in self.files:
            file.verify()
        self._ends = list(accumulate(shard.samples for shard in shards))

    def read(self, position: int, where: str) -> list[torch.Tensor]:
        """Features ``[1, tokens, width]`` of each image of the sample.

        Raises:
            SampleError: an image had none, or its features are damaged; it begins with ``where``.
        """
        import torch

        number = bisect.bisect_right(self._ends, position)
        file = self.files[number]
        opened = _opened(file, os.getpid())
        sample = position - self._ends[number] + file.samples
        first = int(opened.image_ends[sample - 1]) if sample else 0
        found = []
        for image in range(first, int(opened.image_ends[sample])):
            content = opened.read(image, where)
            values = torch.frombuffer(content, dtype=getattr(torch, file.dtype))
            found.append(values.view(1, file.tokens, file.width))
        return found


class _Opened:
    """A file of features, open, with its two small tensors in memory."""

    def __init__(self, file: FeatureFile, opened: OpenFile) -> None:
        self.file, self.opened = file, opened
        start = os.pread(opened.descriptor, file.features_at, 0)
        if not start.startswith(file.header) or len(start) < file.features_at:
            raise ValueError(f"{file.path} is not what {MANIFEST} says of it: remove it and {AGAIN}.")
        self.image_ends = np.frombuffer(start, "<i8", file.samples, len(file.header))
        self.crc32 = np.frombuffer(start, "<i8", file.images, file.checksums_at)
        ends = [0, *self.image_ends.tolist(), file.images]
        if ends != sorted(ends):
            raise ValueError(f"{file.path} has broken image_ends: remove it and {AGAIN}.")

    def read(self, image: int, where: str) -> bytearray:
        file = self.file
        if self.crc32[image] == UNREADABLE:
            raise SampleError(f"{where} has an image that could not be decoded when {file.path} was computed")
        offset = file.features_at + image * file.image_bytes
        content = bytearray(file.image_bytes)
        if os.preadv(self.opened.descriptor, [content], offset) < len(content):
            raise SampleError(f"{where}: {file.path} ends inside the features of image {image}: remove it and {AGAIN}")
        if zlib.crc32(content) != self.crc32[image]:
            raise SampleError(
                f"{where}: {file.path} is damaged at byte {offset} (image {image}): remove it and {AGAIN}"
            )
        return content


@lru_cache(maxsize=256)
def _opened(file: FeatureFile, process: int) -> _Opened:
    return _Opened(file, open_file(str(file.path), process))
