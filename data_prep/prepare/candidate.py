"""What a source yields: a sample that is still to be checked, or the reason why there is none."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

LARGEST_FILE = 512 * 2**20  # bytes of an image; what is larger is none


class BadSample(Exception):
    """A sample that cannot be trained on: ``reason`` is one word to count by, ``detail`` says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Candidate:
    """``images`` are names in the order of the ``<image>`` tags; ``load`` reads one, ``mask`` its pixel map.

    ``answered``: whether the conversation must end with an answer. ``load`` and ``mask`` raise BadSample.
    """

    id: str
    conversations: Any
    images: list[str]
    load: Callable[[int], bytes]
    mask: Callable[[], bytes] | None = None
    answered: bool = True


@lru_cache(maxsize=64)
def _real_root(root: Path) -> str:
    return os.path.realpath(root)


def read_inside(root: Path, name: str) -> bytes:
    """The file ``name`` under ``root``, which neither the name nor a link may leave. Raises BadSample."""
    if "\0" in name or os.path.isabs(name) or ".." in Path(name).parts:
        raise BadSample("path_outside_root", f"{name!r} is not a path below the image root")
    top = _real_root(root)
    try:
        path = os.path.realpath(os.path.join(top, name), strict=True)
        if os.path.commonpath([top, path]) != top:
            raise BadSample("path_outside_root", f"{name} is a link to {path}, outside of the image root")
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadSample("missing_image", f"{name} is not a file")
        if status.st_size > LARGEST_FILE:
            raise BadSample("undecodable_image", f"{name} has {status.st_size} bytes")
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError, PermissionError, UnicodeEncodeError) as error:
        raise BadSample("missing_image", f"{name}: {getattr(error, 'strerror', 'not a file name')}") from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
            raise BadSample("missing_image", f"{name}: {error.strerror}") from error
        raise
