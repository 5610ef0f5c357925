"""Where each record of a JSON array or a JSONL file lies, found in one pass with flat memory."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 22
LARGEST_RECORD = 64 * 2**20  # bytes; the array is taken for broken where a record seems longer


def find_records(path: Path) -> tuple[array[int], str]:
    """[start, size, start, size, ...] in bytes, and the file's sha256.

    Raises:
        ValueError: the file is neither, or the array breaks off or cannot be parsed at some record.
    """
    digest = hashlib.sha256()
    places: array[int] = array("q")
    with path.open("rb") as file:
        first = file.read(3)
        if first != b"\xef\xbb\xbf":  # a byte order mark
            file.seek(0)
        opening = next((byte for byte in iter(lambda: file.read(1), b"") if byte.strip()), b"")
        file.seek(0)
        if opening == b"[":
            for start, size in _array_records(_blocks(file, digest), path):
                places.extend((start, size))
        elif opening == b"{":
            position = 0
            for line in file:
                digest.update(line)
                if line.strip():
                    places.extend((position, len(line)))
                position += len(line)
        else:
            raise ValueError(f"{path} is neither a JSON array nor JSON lines: it starts with {opening!r}")
    return places, digest.hexdigest()


def _blocks(file, digest) -> Iterator[bytes]:  # type: ignore[no-untyped-def]
    for block in iter(lambda: file.read(BLOCK), b""):
        digest.update(block)
        yield block


def _array_records(blocks: Iterator[bytes], path: Path) -> Iterator[tuple[int, int]]:
    # Latin-1 turns one byte into one character, so positions in the text are positions in the file; what JSON's
    # syntax consists of is ASCII, and the bytes of other characters in UTF-8 are not.
    decode = json.JSONDecoder(strict=False).raw_decode
    text, base, position, number = "", 0, 0, 0

    def refill() -> bool:
        nonlocal text, base, position
        block = next(blocks, b"")
        if block:
            text, base, position = text[position:] + block.decode("latin-1"), base + position, 0
        return bool(block)

    def next_character() -> str:
        nonlocal position
        while True:
            while position < len(text) and text[position] in " \t\r\n":
                position += 1
            if position < len(text) or not refill():
                return text[position : position + 1]

    while next_character() != "[":  # a byte order mark
        position += 1
    position += 1
    if next_character() == "]":
        _drain(blocks)
        return
    while True:
        next_character()
        try:
            _, end = decode(text, position)
            if len(text) - end < 3 and refill():
                continue  # a number such as 1e-5 may go on in the next block
        except (json.JSONDecodeError, RecursionError) as error:
            if len(text) - position <= LARGEST_RECORD and refill():
                continue
            raise ValueError(
                f"{path}: record {number}, at byte {base + position}, is broken or cut off, and the array cannot be "
                f"read past it: repair the file or download it again"
            ) from error
        yield base + position, end - position
        position, number = end, number + 1
        separator = next_character()
        position += 1
        if separator == "]":
            _drain(blocks)
            return
        if separator != ",":
            raise ValueError(
                f"{path}: after record {number - 1}, at byte {base + position - 1}, stands {separator!r} instead of "
                f"a comma: repair the file or download it again"
            )


def _drain(blocks: Iterator[bytes]) -> None:
    """Reads on to the end, for the checksum."""
    for _ in blocks:
        pass
