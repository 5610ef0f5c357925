"""What a study has finished before: its summary keeps every number, so runs that are there are neither repeated nor
lost where their directories are gone, on another machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_pre.study.runs import StudyRun
from nemo_pre.study.summary import SUMMARY, differing

ENCODER = "encoder"  # the setting that is known only once it has been taught


@dataclass(frozen=True)
class Kept:
    """The finished second stages of an earlier summary.

    Attributes:
        summary: as it was written, None where there is none.
        finished: (arm, seed) of each.
    """

    summary: Mapping[str, Any] | None = None
    finished: frozenset[tuple[str, int]] = field(default_factory=frozenset)

    def has(self, run: StudyRun) -> bool:
        """Whether the run was finished, and its directory is gone."""
        return (run.arm, run.seed) in self.finished and not run.directory.is_dir()

    def numbers(self, run: StudyRun) -> dict[str, Any]:
        assert self.summary is not None
        found: dict[str, Any] = self.summary["arms"][run.arm]["seeds"][str(run.seed)]
        return found

    def others(self, runs: Sequence[StudyRun]) -> list[tuple[str, int]]:
        """What is kept beside ``runs``."""
        return sorted(self.finished - {(run.arm, run.seed) for run in runs})

    def check_encoder(self, taught: Mapping[str, Any] | None) -> None:
        """Refuse to go on with another encoder: runs are compared as runs of one.

        Raises:
            ValueError: the runs kept saw through another one.
        """
        if self.summary is None or taught is None:
            return
        before = self.summary["settings"][ENCODER]
        if before is not None and before != json.loads(json.dumps(dict(taught))):
            raise ValueError(
                "The summary's runs saw through another encoder than the one in runs=DIRECTORY (the one taught last "
                "differs in its accuracy): give that one, or another out=DIRECTORY."
            )


def read_kept(out: Path, settings: Mapping[str, Any], format_name: str, version: int) -> Kept:
    """What ``out``'s summary has finished.

    Args:
        settings: of the study that goes on; all but the encoder must be those of the summary.

    Raises:
        ValueError: there is a summary of another study, or one that cannot be read.
    """
    file = out / SUMMARY
    if not file.is_file():
        return Kept()
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        told = (summary["format"], summary["format_version"])
        before, runs = summary["settings"], summary["runs"]
        finished = frozenset((run["arm"], int(run["seed"])) for run in runs if run["finished"])
        for arm, seed in finished:
            summary["arms"][arm]["seeds"][str(seed)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} is no summary of this study ({error!r}): give another out=DIRECTORY, or remove it."
        ) from error
    if told != (format_name, version):
        raise ValueError(f"{file} is a summary of another kind ({told}): give another out=DIRECTORY, or remove it.")
    if told_apart := differing(before, settings, {*settings, *before} - {ENCODER}):
        raise ValueError(
            f"{file} has the numbers of a study with other settings ({told_apart}): give these, or another "
            f"out=DIRECTORY."
        )
    return Kept(summary, finished)
