"""Samples that a roll-back left out, on record beside the run, so that every later start leaves them out too.

Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RECORD = "skipped_samples.jsonl"


@dataclass(frozen=True)
class Skipped:
    """A stretch of the training stream that a run leaves out.

    Attributes:
        first, end: positions of the whole training stream, [first, end).
        data, shuffle_seed: which stream that is.
        checkpoint_step, step: trained on after the one and up to the other.
        reason: what was wrong.
    """

    first: int
    end: int
    data: str
    shuffle_seed: int
    checkpoint_step: int
    step: int
    reason: str


def record_skipped(output_dir: str, skipped: Skipped) -> None:
    """Append the skipped stretch to the run's record, and have it on the disk before this returns.

    Raises:
        OSError: the disk is full or gone.
    """
    with (Path(output_dir) / RECORD).open("a") as file:
        file.write(json.dumps(asdict(skipped)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_skipped(output_dir: str) -> Sequence[Skipped]:
    """All that is on record; a line that was cut while it was written never had a start behind it."""
    path = Path(output_dir) / RECORD
    try:
        *lines, _ = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
        return [Skipped(**json.loads(line)) for line in lines if line.endswith("}")]
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} has a line that no roll-back wrote ({error}): restore the file.") from error
