"""The checkpoints of a run as files: which are complete, damaged, the newest. Imports nothing heavy."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

log = logging.getLogger(__name__)

Damaged = Callable[[Path], str]  # what is wrong with a checkpoint, empty if nothing is

SIZES = "sizes.json"  # bytes of every file of a checkpoint, written when the save is complete
DAMAGE = "damage.txt"  # in a checkpoint of which a reader found that its bytes are not those that were saved
UNFINISHED = "-unfinished"  # NeMo's mark: a file beside a checkpoint that is being written or removed


def newest_checkpoint(directory: Path, damaged: Damaged | None = None) -> str | None:
    """The newest complete checkpoint in ``directory``, or None. Warns of a newer one that is damaged.

    Args:
        damaged: says what is wrong with a checkpoint; :func:`damage_of` if not given.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    checkpoints = numbered_checkpoints(directory)
    for step in sorted(checkpoints, reverse=True):
        damage = (damaged or damage_of)(checkpoints[step])
        if not damage:
            return str(checkpoints[step])
        log.warning("%s is damaged, %s.", checkpoints[step], damage)
    if checkpoints:
        raise ValueError(
            f"Every checkpoint in {directory} is damaged: restore the files of one, or move them away to begin anew."
        )
    return None


def checkpoint_dir(config: RunConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def start_checkpoint(
    config: RunConfig, damaged: Damaged | None = None, former_damaged: Damaged | None = None
) -> tuple[str | None, str | None]:
    """The run's own newest checkpoint, and the one whose weights it starts with: that, or ``init_from``'s.

    Args:
        damaged, former_damaged: say what is wrong with a checkpoint of the run's own, and with ``init_from``'s.

    Raises:
        ValueError: all of the run's checkpoints are damaged, or ``init_from`` names none.
    """
    newest = newest_checkpoint(checkpoint_dir(config), damaged) if config.resume else None
    return newest, newest or (former_stage(config.init_from, former_damaged) if config.init_from else None)


def former_stage(path: str, damaged: Damaged | None = None) -> str:
    """The checkpoint ``init_from`` names: one by itself, or the newest of a run's ``checkpoints`` directory.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    directory = Path(path)
    if directory.name == "checkpoints" or not (directory / "weights").is_dir():
        newest = newest_checkpoint(directory, damaged)
        if newest is None:
            raise ValueError(f"init_from={path} is neither a checkpoint nor a directory with complete checkpoints.")
        return newest
    damage = (damaged or damage_of)(directory)
    if damage:
        raise ValueError(f"{directory} is damaged, {damage}: restore its files, or take another checkpoint.")
    return str(directory)


def newest_step(directory: Path) -> int:
    """The step of the newest complete checkpoint, 0 without one.

    Raises:
        ValueError: there are checkpoints, and all of them are damaged.
    """
    return int((newest_checkpoint(directory) or "=0").rpartition("=")[2])


def numbered_checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints in ``directory`` whose save was finished, by step."""
    return {
        int(path.name.removeprefix("step=")): path
        for path in directory.glob("step=*")
        if path.is_dir() and path.name.removeprefix("step=").isdigit()
        if not path.with_name(path.name + UNFINISHED).exists()
    }


def record_sizes(checkpoint: Path) -> None:
    """Write down how large every file of a complete checkpoint is."""
    sizes = {
        str(path.relative_to(checkpoint)): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name not in (SIZES, DAMAGE)
    }
    (checkpoint / SIZES).write_text(json.dumps(sizes, indent=1))


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint's files, empty if nothing is. One without recorded sizes, such as an import, is
    taken as it is."""
    mark = checkpoint / DAMAGE
    if mark.is_file():
        return mark.read_text().strip()
    try:
        sizes = dict(json.loads((checkpoint / SIZES).read_text()))
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError):
        return f"{SIZES} cannot be read"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes instead of {size}"
    return ""


def mark_damaged(checkpoint: Path, damage: str) -> None:
    """Remember what was found, so that the run sets the checkpoint aside when it begins to write."""
    (checkpoint / DAMAGE).write_text(damage + "\n")
