"""The checkpoints of a run as files: which are complete, damaged, the newest. Imports nothing heavy.

The newest is the one that was saved last. Every checkpoint says how many its directory had seen saved by then, which
no name, copy or clock changes.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

log = logging.getLogger(__name__)

Damaged = Callable[[Path], str]  # what is wrong with a checkpoint, empty if nothing is

PROGRESS = "progress.json"  # where in its run a checkpoint is, written when the save is complete
NAME = re.compile(r"step=(\d+)(?:-v\d+)?")  # Lightning adds the version where the name is taken
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
    checkpoints = run_checkpoints(directory)
    for checkpoint in reversed(checkpoints):
        damage = (damaged or damage_of)(checkpoint)
        if not damage:
            return str(checkpoint)
        log.warning("%s is damaged, %s.", checkpoint, damage)
    if checkpoints:
        raise ValueError(
            f"Every checkpoint in {directory} is damaged: restore the files of one, or move them away to begin anew."
        )
    return None


def checkpoint_dir(config: RunConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def start_checkpoint(config: RunConfig, damaged: Damaged | None = None) -> str | None:
    """The checkpoint whose weights the run starts with: its own newest, or ``init_from``'s; None without either.

    Args:
        damaged: says what is wrong with a checkpoint; :func:`damage_of` if not given.

    Raises:
        ValueError: all of the run's checkpoints are damaged, or ``init_from`` names none.
    """
    newest = newest_checkpoint(checkpoint_dir(config), damaged) if config.resume else None
    return newest or (former_stage(config.init_from, damaged=damaged) if config.init_from else None)


def former_stage(path: str, option: str = "init_from", damaged: Damaged | None = None) -> str:
    """The checkpoint ``path`` names: one by itself, or the newest of a run's ``checkpoints`` directory.

    Args:
        option: of the command line, which named it.
        damaged: what is wrong with a checkpoint, if something; None: :func:`damage_of`.

    Raises:
        ValueError: it is neither, or it, or every checkpoint there, is damaged.
    """
    directory = Path(path)
    if not directory.is_dir():
        raise ValueError(f"{option}={path} is not a directory: name a checkpoint, or a run's checkpoints.")
    if directory.suffix == ".ckpt":
        raise ValueError(f"{option}={path}: NeMo cuts .ckpt off where it loads a checkpoint, so rename the directory.")
    if directory.name == "checkpoints" or not (directory / "weights").is_dir():
        newest = newest_checkpoint(directory, damaged)
        if newest is None:
            raise ValueError(f"{option}={path} is neither a checkpoint nor a directory with complete checkpoints.")
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
    newest = newest_checkpoint(directory)
    return 0 if newest is None else step_of(newest) or 0


def run_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints in ``directory`` whose save was finished, in the order in which they were saved."""
    finished = [
        path
        for path in directory.glob("step=*")
        if path.is_dir() and NAME.fullmatch(path.name) and not path.with_name(path.name + UNFINISHED).exists()
    ]
    return sorted(finished, key=lambda path: (_saves(path), step_of(path) or 0, path.name))


def numbered_checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints in ``directory`` whose save was finished, by step: of two of one step the one saved later."""
    return {step: path for path in run_checkpoints(directory) if (step := step_of(path)) is not None}


def step_of(checkpoint: str | Path) -> int | None:
    """Optimizer steps done in a checkpoint, which it says itself, or its name where it does not; None where it is not
    a run's."""
    named = NAME.fullmatch(Path(checkpoint).name)
    return _progress(Path(checkpoint)).get("step", int(named[1]) if named else None)


def record_progress(checkpoint: Path, step: int, data: str | None = None) -> None:
    """Write down where in its run a complete checkpoint is: ``step``, ``saves`` (of its directory, with this one),
    ``time`` (seconds since 1970) and ``data``, the fingerprint of what is trained on."""
    others = [_progress(path).get("saves", 0) for path in checkpoint.parent.glob("step=*")]
    saves = 1 + max(others, default=0)
    progress = {"step": step, "saves": saves, "time": round(time.time(), 3), "data": data}
    (checkpoint / PROGRESS).write_text(json.dumps(progress))


def data_of(checkpoint: str | Path) -> str | None:
    """The fingerprint of what a checkpoint was trained on; None where it does not say so."""
    return _progress(Path(checkpoint)).get("data")


def _saves(checkpoint: Path) -> float:
    """Which save of its directory a checkpoint was: 0 where it does not say so. One that does but cannot be read is
    damaged, and comes last, where that is noticed and said."""
    unreadable = math.inf if (checkpoint / PROGRESS).exists() else 0
    return _progress(checkpoint).get("saves", unreadable)


def _progress(checkpoint: Path) -> dict[str, Any]:
    """What :func:`record_progress` wrote; empty where it did not, or where that cannot be read."""
    try:
        found = json.loads((checkpoint / PROGRESS).read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(found, dict) and all(type(found.get(name)) is int for name in ("step", "saves"))
    return found if whole else {}


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
        sizes = json.loads((checkpoint / SIZES).read_text())
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, RecursionError):
        sizes = None
    if not isinstance(sizes, dict):
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
