"""Runs in arms: those that differ in nothing but their seed, or those that the user put together."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.options import split_paths
from nemo_pre.report.runs import SEEDS, Run, read_run

MAY_DIFFER = (*SEEDS, "output_dir", "name")  # in which runs of one arm may differ


@dataclass(frozen=True)
class Arm:
    label: str
    runs: list[Run]

    @property
    def by_seed(self) -> bool:
        """Whether every run has a seed of its own, so that runs of two arms can be paired."""
        seeds = [run.seed for run in self.runs]
        return None not in seeds and len(set(seeds)) == len(seeds)


@dataclass(frozen=True)
class OptionDifference:
    """An option in which arms differ; ``values`` has a text per arm."""

    option: str
    values: list[str]


def arrange(words: Sequence[str], labels: Sequence[str] = ()) -> list[Arm]:
    """Arms in the order given. ``RUN,RUN`` is an arm; without any such word, equal options (seeds apart) make one.

    Raises:
        ValueError: nothing to compare, a run given twice, or a number of labels that does not fit.
    """
    explicit = any("," in word and not Path(word).is_dir() for word in words)
    groups = [split_paths(word) if explicit else [word] for word in words]
    directories = [name for group in groups for name in group]
    real = [os.path.realpath(name) for name in directories]
    if twice := [name for name, path in zip(directories, real, strict=True) if real.count(path) > 1]:
        raise ValueError(f"{twice[0]} is given twice: name every run once.")
    runs = [[read_run(name) for name in group] for group in groups]
    if not explicit:
        runs = _group([run for group in runs for run in group])
    if len(runs) < 2:
        raise ValueError("There is one arm only, nothing to compare: give runs that differ in more than their seed.")
    if labels and len(labels) != len(runs):
        raise ValueError(f"labels has {len(labels)} names for {len(runs)} arms: give one for each.")
    names = list(labels) or _unique([_label(group) for group in runs])
    return [Arm(name, group) for name, group in zip(names, runs, strict=True)]


def option_differences(arms: Sequence[Arm]) -> list[OptionDifference]:
    """What the configs of the arms do not share, seeds and places apart; an unknown config counts for nothing."""
    known = [arm for arm in arms if any(run.options is not None for run in arm.runs)]
    names = sorted({name for arm in known for run in arm.runs for name in run.options or ()} - set(MAY_DIFFER))
    found = []
    for name in names:
        if len({text for arm in known for text in _values(arm, name)}) > 1:
            found.append(OptionDifference(name, [" or ".join(_values(arm, name)) or "?" for arm in arms]))
    return found


def _values(arm: Arm, option: str) -> list[str]:
    """The different texts of an option in an arm: several only if the user put the arm together."""
    texts = [_text(run.options.get(option)) for run in arm.runs if run.options is not None]
    return list(dict.fromkeys(texts))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _group(runs: list[Run]) -> list[list[Run]]:
    groups: list[list[Run]] = []
    for run in runs:
        alike = next((group for group in groups if _alike(group[0], run)), None)
        if alike is None:
            groups.append([run])
        else:
            alike.append(run)
    return groups


def _alike(one: Run, other: Run) -> bool:
    if one.options is None or other.options is None:
        return False
    names = (one.options.keys() | other.options.keys()) - set(MAY_DIFFER)
    return all(_text(one.options.get(name)) == _text(other.options.get(name)) for name in names)


def _label(runs: list[Run]) -> str:
    """The directory's name, or what the names of several share in front."""
    names = [_name(run) for run in runs]
    shared = re.sub(r"[_\-.= ]*(seed)?[_\-.= ]*\d*$", "", os.path.commonprefix(names)) if len(runs) > 1 else ""
    return shared or names[0]


def _name(run: Run) -> str:
    return run.directory.name or run.directory.resolve().name or str(run.directory)


def _unique(labels: list[str]) -> list[str]:
    counts = {label: labels.count(label) for label in labels}
    return [
        label if counts[label] == 1 else f"{label} ({labels[: number + 1].count(label)})"
        for number, label in enumerate(labels)
    ]
