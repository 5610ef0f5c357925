"""Index arrays in files: mapped, not read, so that any number of processes may use one of any size."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np


def mapped_array(path: Path) -> np.ndarray:
    """The array that ``np.save`` wrote to ``path``; opened once per process."""
    status = path.stat()
    return _mapped(path, status.st_ino, status.st_mtime_ns)


@lru_cache(maxsize=256)
def _mapped(path: Path, inode: int, changed: int) -> np.ndarray:
    del inode, changed  # so that a file which was written anew is opened anew
    return np.load(path, mmap_mode="r")
