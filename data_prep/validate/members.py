"""The members of a sample, by what follows the key in their names.

``json``; one image (``jpg``, ``jpeg``, ``png``, ``webp``) or several in the order of their tags (``0.jpg``,
``1.png``, ...); and, optionally, ``mask.png``.
"""

from __future__ import annotations

import re
from collections.abc import Collection

IMAGE = re.compile(r"(?:(0|[1-9][0-9]*)\.)?(?:jpg|jpeg|png|webp)")
MASK = re.compile(r"(?:(?:0|[1-9][0-9]*)\.)?mask\.png")
KNOWN_ENDS = ("json", "jpg", "jpeg", "png", "webp")


def images_of(extensions: Collection[str]) -> list[str]:
    """The extensions that are images, in the order of the tags."""
    numbered = [(int(match[1] or 0), ext) for ext in extensions if (match := IMAGE.fullmatch(ext))]
    return [extension for _, extension in sorted(numbered)]


def are_numbered(images: list[str]) -> bool:
    """Whether it is one image without a number, or images with the numbers 0, 1, 2, ..."""
    numbers = [extension.partition(".")[0] for extension in images]
    unnumbered = len(images) == 1 and "." not in images[0]
    return unnumbered or numbers == [str(number) for number in range(len(images))]


def is_stray_suffix(extension: str) -> bool:
    """Whether it ends like a member of the format but is none, as when the key has a dot: ``2.json``."""
    ends_known = extension.rpartition(".")[2] in KNOWN_ENDS
    return ends_known and extension != "json" and not IMAGE.fullmatch(extension) and not MASK.fullmatch(extension)
