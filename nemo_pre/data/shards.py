"""Random access to the samples of indexed tar shards (written by ``data_prep.shards``)."""

from __future__ import annotations

import bisect
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import Shard

IMAGE_MEMBER = re.compile(r"(?:(\d+)\.)?(?:png|jpg|jpeg|webp)")  # "jpg" of one image; "0.jpg", "1.png" of several
TAR_BLOCK = 512


@dataclass(frozen=True)
class RawSample:
    """``record`` is the sample's JSON; ``images`` the encoded files it names, in the order of the tags."""

    key: str
    shard: Path
    record: dict[str, Any]
    images: list[bytes]

    @property
    def image(self) -> bytes | None:
        """The first image, None for a text-only sample."""
        return self.images[0] if self.images else None

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

    def read(self, position: int, images: bool = True) -> RawSample:
        """``images=False`` leaves the images unread, and the list of them empty.

        Raises:
            SampleError: the sample is cut, displaced, incomplete or broken JSON; it names shard and key.
        """
        shard, entry = self._locate(position)
        where = f"sample {entry['key']} of {shard.path}"
        try:
            record = json.loads(self.read_member(position, "json"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise SampleError(f"{where} has broken JSON ({error}): prepare the data again") from error
        if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
            raise SampleError(f"{where} has no list of conversations in its JSON: prepare the data again")
        members = _image_members(entry["members"], where)
        named = _named_images(record)
        if len(named) > len(members):
            raise SampleError(
                f"{where} names the image(s) {', '.join(map(str, named))} but holds {len(members) or 'none'}: "
                f"prepare the data again"
            )
        content = [self.read_member(position, name) for name in members] if images else []
        return RawSample(entry["key"], shard.path, record, content)

    def num_images(self, position: int) -> int:
        """Number of a sample's images, read from the index alone.

        Raises:
            SampleError: they are not numbered from 0.
        """
        shard, entry = self._locate(position)
        return len(_image_members(entry["members"], f"sample {entry['key']} of {shard.path}"))

    def read_member(self, position: int, extension: str) -> bytes:
        """The bytes of one file of a sample, such as ``json``, ``png`` or ``mask.png``."""
        shard, entry = self._locate(position)
        where = f"sample {entry['key']} of {shard.path}"
        if extension not in entry["members"]:
            raise SampleError(f"{where} has no member {extension}: prepare the data again")
        offset, size = entry["members"][extension]
        # The member's header comes along, to notice an index that belongs to another tar.
        file = open_file(str(shard.path), os.getpid())
        inside = offset + size <= shard.bytes  # else an index of nonsense would ask for more than there is memory
        content = os.pread(file.descriptor, TAR_BLOCK + size, offset - TAR_BLOCK) if inside else b""
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
        return self.shards[number], self.indices[number][position - self.ends[number] + self.shards[number].samples]


def _image_members(members: dict[str, Any], where: str) -> list[str]:
    """The images among a sample's members, in order."""
    found = [(match[1], name) for name in members if (match := IMAGE_MEMBER.fullmatch(name))]
    if len(found) == 1 and found[0][0] is None:
        return [found[0][1]]
    numbers = [-1 if number is None else int(number) for number, _ in found]
    if sorted(numbers) != list(range(len(numbers))):
        names = ", ".join(name for _, name in found)
        raise SampleError(f"{where} holds the images {names}, which are not numbered from 0: prepare the data again")
    return [name for _, (_, name) in sorted(zip(numbers, found, strict=True))]


def _named_images(record: dict[str, Any]) -> list[Any]:
    named = record.get("images") or record.get("image") or []
    return named if isinstance(named, list) else [named]


class _Index:
    """The entries of an index, kept as JSON: a million dictionaries would be copied into every loader process."""

    def __init__(self, entries: list[dict[str, Any]]):
        lines = [json.dumps(entry).encode() for entry in entries]
        self._json = b"".join(lines)
        self._ends = np.cumsum([0, *map(len, lines)])

    def __getitem__(self, number: int) -> dict[str, Any]:
        entry: dict[str, Any] = json.loads(self._json[self._ends[number] : self._ends[number + 1]])
        return entry


def _read_index(shard: Shard) -> _Index:
    try:
        index = json.loads(shard.index_path.read_text())
        well_formed = all(map(_is_entry, index))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{shard.index_path} is not a readable index ({error!r}): prepare the data again") from error
    if not well_formed or len(index) != shard.samples:
        raise ValueError(
            f"{shard.index_path} does not list the {shard.samples} samples of the manifest: prepare the data again"
        )
    return _Index(index)


def _is_entry(entry: dict[str, Any]) -> bool:
    are_places = all(
        type(offset) is int and type(size) is int and offset >= TAR_BLOCK and size >= 0
        for offset, size in entry["members"].values()
    )
    return isinstance(entry["key"], str) and "json" in entry["members"] and are_places


class OpenFile:
    """A descriptor that is closed with the last reference to it."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # os itself may be gone when a process ends
        if hasattr(self, "descriptor"):
            close(self.descriptor)


@lru_cache(maxsize=256)
def open_file(path: str, process: int) -> OpenFile:
    """An open file per process: ``pread`` needs no position, so threads may share it, and forks get their own.

    Raises:
        ValueError: it cannot be opened.
    """
    del process
    try:
        return OpenFile(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be opened ({error.strerror}): prepare the data again") from error
