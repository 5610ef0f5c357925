"""The checksums of a checkpoint's tensors: XXH3, 64 bits, of the bytes of every stored part.

They are made of what is written, while it is written, by the process that writes it: one in the background where
saving is asynchronous. They travel with the part's place in its file and lie in the checkpoint's own metadata.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import xxhash

ATTRIBUTE = "xxh3_64"  # of torch's _StorageInfo, whose attributes all go into the metadata
BLOCK = 8 << 20  # bytes read at a time


class HashingStream:
    """A file to write to, and the checksum of what was."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._digest = xxhash.xxh3_64()

    def write(self, content: Any) -> int:
        self._digest.update(content)
        return self._stream.write(content)

    def checksum(self) -> int:
        return self._digest.intdigest()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def with_checksums(write_item: Callable[..., Any]) -> Callable[..., Any]:
    """torch's ``_write_item``, whose results know the checksum of what they wrote."""

    @functools.wraps(write_item)
    def writing(transforms: Any, stream: IO[bytes], *args: Any, **kwargs: Any) -> Any:
        hashing = HashingStream(stream)
        result = write_item(transforms, hashing, *args, **kwargs)
        setattr(result.storage_data, ATTRIBUTE, hashing.checksum())
        return result

    return writing


def stored_checksum(place: Any) -> int | None:
    """The checksum of a stored part; None in checkpoints that were written without."""
    found = vars(place).get(ATTRIBUTE)
    return found if isinstance(found, int) else None


def damage_of_part(weights: Path, name: str, place: Any) -> str:
    """What is wrong with the bytes of a stored part, empty if nothing is.

    Raises:
        OSError: the file cannot be read.
    """
    with (weights / place.relative_path).open("rb", buffering=0) as file:
        return damage_of_range(file, name, place)


def damage_of_range(file: IO[bytes], name: str, place: Any) -> str:
    """:func:`damage_of_part` in a file that is open."""
    expected = stored_checksum(place)
    if expected is None:
        return ""
    digest, left = xxhash.xxh3_64(), place.length
    file.seek(place.offset)
    buffer = memoryview(bytearray(min(BLOCK, max(left, 1))))
    while left > 0:
        read = file.readinto(buffer[: min(left, len(buffer))])  # type: ignore[attr-defined]
        if not read:
            return f"{place.relative_path} ends before {name}"
        digest.update(buffer[:read])
        left -= read
    return "" if digest.intdigest() == expected else f"{place.relative_path} has other bytes of {name} than were saved"
