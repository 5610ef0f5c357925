"""A directory that is there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def refuse_existing(target: Path) -> None:
    """Check that nothing has the name yet.

    Raises:
        ValueError: something has.
    """
    if target.exists():
        raise ValueError(f"{target} exists already: choose another name, or remove it first.")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A directory to be filled, ``TARGET.partial``, which gets its name when the block ends well.

    What a killed run left of it is thrown away.

    Raises:
        ValueError: ``target`` exists already.
    """
    refuse_existing(target)
    unfinished = target.with_name(target.name + ".partial")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    os.replace(unfinished, target)
