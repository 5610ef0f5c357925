"""The checksums of a checkpoint's small files: all but those with tensors, whose checksums lie in its metadata.

Imports nothing heavy.
"""

from __future__ import annotations

import json
from pathlib import Path

CHECKSUMS = "checksums.json"  # XXH3, 64 bits, in hexadecimal, by file
TENSORS = ".distcp"  # the end of the name of a file with tensors
BLOCK = 8 << 20  # bytes read at a time


def checksum_of(path: Path) -> str:
    """XXH3 of a file, 64 bits, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    import xxhash

    digest = xxhash.xxh3_64()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def record_checksums(checkpoint: Path, folder: str = "") -> None:
    """Write down the checksums of the small files in a folder of a complete checkpoint, or in all of it."""
    found = {
        str(path.relative_to(checkpoint)): checksum_of(path)
        for path in sorted((checkpoint / folder).rglob("*"))
        if path.is_file() and path.suffix != TENSORS and path.name != CHECKSUMS
    }
    (checkpoint / CHECKSUMS).write_text(json.dumps(found, indent=1) + "\n")


def has_checksums(checkpoint: Path) -> bool:
    return (checkpoint / CHECKSUMS).is_file()


def damage_of_small_files(checkpoint: Path) -> str:
    """Which file is missing or differs from what was saved, empty if none does or nothing is known of them."""
    try:
        recorded = dict(json.loads((checkpoint / CHECKSUMS).read_text()))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, TypeError):
        return f"{CHECKSUMS} cannot be read"
    for name, expected in recorded.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{CHECKSUMS} names {name}, which is no file of the checkpoint"
        try:
            if checksum_of(checkpoint / name) != expected:
                return f"{name} has other bytes than were saved"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""
