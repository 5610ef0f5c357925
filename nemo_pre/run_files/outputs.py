"""Places that a verb will write to, tried before it works for minutes. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def check_output_file(option: str, path: str | Path) -> None:
    """Check that a file can be written at ``path``, whose folder is made; what lies there stays as it is.

    Raises:
        ValueError: it cannot be.
    """
    file = Path(path)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        new = not file.exists()
        file.open("ab").close()
        if new:
            os.unlink(file)
    except OSError as error:
        raise ValueError(f"{option}={path} cannot be written ({error.strerror}): name another file.") from error


def check_output_folder(option: str, path: str | Path) -> None:
    """Check that ``path`` can become a folder in which files can be written, without making it.

    Raises:
        ValueError: it cannot.
    """
    folder = Path(path)
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"{option}={path} cannot be a folder ({nearest} takes no files): name another one.")


def make_output_folder(option: str, path: str | Path) -> Path:
    """The folder ``path``, made where it is not there, in which files can be written.

    Raises:
        ValueError: it cannot be made, or written in.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}={path} cannot be a folder ({error.strerror}): name another one.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{option}={path} is a folder that you may not write in: name another one.")
    return folder
