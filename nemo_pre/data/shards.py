"""Random access to the samples of indexed tar shards (written by ``data_prep.shards``)."""

from __future__ import annotations

import bisect
import json
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import Shard

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")
TAR_BLOCK = 512


@dataclass(frozen=True)
class RawSample:
    """``record`` is the sample's JSON; ``image`` the encoded file it names, None for a text-only sample."""

    key: str
    shard: Path
    record: dict[str, Any]
    image: bytes | None

    @property
    def where(self) -> str:
        return f"sample {self.key} of {self.shard}"


class ShardedSamples:
    """The samples of ``shards`` in the order of the manifest: ``len``, :meth:`read`, :meth:`read_member`.

    Indices are read here, once; the tars are opened when first read, in whatever process does that.

    Raises:
        ValueError: an index is not readable or disagrees with the manifest.
    """

    def __init__(self, shards: list[Shard]):
        self.shards = shards
        self.indices = [_read_index(shard) for shard in shards]
        self.ends = list(accumulate(shard.samples for shard in shards))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def read(self, position: int) -> RawSample:
        """Raises SampleError, naming shard and key, if the sample is cut, displaced or has broken JSON."""
        shard, entry = self._locate(position)
        where = f"sample {entry['key']} of {shard.path}"
        try:
            record = json.loads(self.read_member(position, "json"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise SampleError(f"{where} has broken JSON ({error}): prepare the data again") from error
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise SampleError(f"{where} has no list of conversations in its JSON: prepare the data again")
        extension = next((ext for ext in IMAGE_EXTENSIONS if ext in entry["members"]), None)
        if record.get("image") and extension is None:
            raise SampleError(f"{where} names the image {record['image']} but holds none: prepare the data again")
        image = self.read_member(position, extension) if extension else None
        return RawSample(entry["key"], shard.path, record, image)

    def read_member(self, position: int, extension: str) -> bytes:
        """The bytes of one file of a sample, such as ``json``, ``png`` or ``mask.png``."""
        shard, entry = self._locate(position)
        where = f"sample {entry['key']} of {shard.path}"
        if extension not in entry["members"]:
            raise SampleError(f"{where} has no member {extension}: prepare the data again")
        offset, size = entry["members"][extension]
        # The member's header comes along, to notice an index that belongs to another tar.
        content = os.pread(_descriptor(str(shard.path), os.getpid()), TAR_BLOCK + size, offset - TAR_BLOCK)
        if len(content) < TAR_BLOCK + size:
            raise SampleError(f"{where}: the tar ends inside {extension}: prepare the data again")
        name = content[:100].rstrip(b"\0").decode(errors="replace")
        if name != f"{entry['key']}.{extension}":
            raise SampleError(f"{where}: the tar has {name!r} where the index has {extension}: prepare the data again")
        return content[TAR_BLOCK:]

    def _locate(self, position: int) -> tuple[Shard, dict[str, Any]]:
        if not 0 <= position < len(self):
            raise IndexError(f"sample {position} of {len(self)}")
        number = bisect.bisect_right(self.ends, position)
        return self.shards[number], self.indices[number][position - self.ends[number]]


def _read_index(shard: Shard) -> list[dict[str, Any]]:
    try:
        index = json.loads(shard.index_path.read_text())
        well_formed = all(isinstance(entry["key"], str) and "json" in entry["members"] for entry in index)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{shard.index_path} is not a readable index ({error!r}): prepare the data again") from error
    if not well_formed or len(index) != shard.samples:
        raise ValueError(
            f"{shard.index_path} does not list the {shard.samples} samples of the manifest: prepare the data again"
        )
    return index


@lru_cache(maxsize=256)
def _descriptor(path: str, process: int) -> int:
    """An open file per process: ``pread`` needs no position, so threads may share it, and forks get their own."""
    del process
    try:
        return os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}): prepare the data again") from error
