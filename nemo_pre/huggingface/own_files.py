"""Files of a Hugging Face directory, and none outside it: a name in an index, or a link, may point anywhere."""

from __future__ import annotations

from pathlib import Path

HUB_FILES = "blobs"  # in the hub's cache, where files of snapshots/REVISION are links to them


def own_file(directory: Path, name: str) -> Path:
    """The path of a file of this directory. Links may lead to other files of it, and from a snapshot of the hub's
    cache to the cache's own.

    Raises:
        ValueError: it is outside.
    """
    path, root = directory / name, directory.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / HUB_FILES)
    try:
        lies_at = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, or a name that no file has
        raise ValueError(f"{name!r} in {directory} is not a file's name: download it again.") from error
    if not any(lies_at.is_relative_to(each) for each in allowed):
        raise ValueError(f"{path} leads out of {directory}, to {lies_at}: put a copy of the file there.")
    return path
