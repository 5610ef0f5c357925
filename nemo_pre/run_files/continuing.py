"""Whether and how a run goes on from the checkpoint in its directory, decided before anything starts."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.config.on_resume import rule_of
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import known
from nemo_pre.options import KEPT, REFUSED, OnResume
from nemo_pre.run_files.checkpoints import Damaged, checkpoint_dir, newest_checkpoint, run_checkpoints, step_of
from nemo_pre.run_files.saved_config import flat, saved_run


@dataclass(frozen=True)
class ChangedOption:
    """An option that has another value than when the checkpoint was written, and what becomes of it."""

    name: str
    before: Any
    now: Any
    rule: OnResume

    def __str__(self) -> str:
        if self.rule.does == KEPT:
            return f"{self.name} stays {shown(self.before)}, not {shown(self.now)}"
        return f"{self.name}={shown(self.now)} (before {shown(self.before)})"


@dataclass(frozen=True)
class Continuation:
    """A run that goes on from one of its own checkpoints.

    Attributes:
        config: the run's, with the options that are kept as they were.
        checkpoint: where it goes on from.
        step: optimizer steps done there.
        changes: what is done otherwise from there on, or kept against the configuration.
    """

    config: RunConfig
    checkpoint: str
    step: int
    changes: list[ChangedOption]

    @property
    def complete(self) -> bool:
        """Whether nothing is left to train."""
        return self.step == self.config.trainer.max_steps

    def sentences(self) -> list[str]:
        """What a user is told: from where it goes on, and what is otherwise, a sentence for all options of a rule."""
        of = f"{self.step} of {self.config.trainer.max_steps}"
        if self.complete:
            others = ", ".join(str(change) for change in self.changes if change.rule.does != KEPT)
            ignored = f" with {others}" if others else ""
            return [
                f"{self.config.output_dir} is complete at step {of}, and nothing is trained{ignored}: raise "
                f"trainer.max_steps to go on, or choose another output_dir."
            ]
        by_rule: dict[OnResume, list[str]] = {}
        for change in self.changes:
            by_rule.setdefault(change.rule, []).append(str(change))
        changes = [f"{', '.join(which)}: {rule.words}." for rule, which in by_rule.items()]
        return [f"continues   at step {of}, from {self.checkpoint}", *(f"otherwise   {each}" for each in changes)]


def continuation(config: RunConfig, damaged: Damaged | None = None) -> Continuation | None:
    """What the run goes on from; None where its directory has no checkpoint.

    Args:
        damaged: what is wrong with a checkpoint, if something; None: what its files' sizes tell.

    Raises:
        ValueError: one sentence on what cannot go on and what to change.
    """
    checkpoints = run_checkpoints(checkpoint_dir(config))
    if not checkpoints:
        return None
    if not config.resume:
        raise ValueError(
            f"{config.output_dir} holds a run at step {step_of(checkpoints[-1])}, beside which resume=false cannot "
            f"begin another one: leave resume=true, or choose another output_dir."
        )
    checkpoint = newest_checkpoint(checkpoint_dir(config), damaged)
    assert checkpoint is not None
    step = step_of(checkpoint)
    assert step is not None
    changes = changed_options(config, checkpoint)
    _refuse(changes, config, step)
    if config.trainer.max_steps < step:
        raise ValueError(
            f"{config.output_dir} is at step {step}, past trainer.max_steps={config.trainer.max_steps}: set it to "
            f"more than {step} to go on, or choose another output_dir."
        )
    keeping = copy.deepcopy(config)
    for change in changes:
        if change.rule.does == KEPT:
            _set(keeping, change.name, change.before)
    return Continuation(keeping, checkpoint, step, changes)


def changed_options(config: RunConfig, checkpoint: str | Path) -> list[ChangedOption]:
    """The options that the run has otherwise than the one that wrote the checkpoint."""
    saved = saved_run(checkpoint)
    before, now = flat(saved), flat(config)
    passed_over = {*NOT_COMPARED, *_without_effect(saved, config, now)}
    return [
        ChangedOption(name, before[name], value, _rule(name).of(before[name], value, config))
        for name, value in now.items()
        if before[name] != value and name not in passed_over and not (name in FOUND and value is None)
    ]


# Of one start, and not of the run; an output_dir that was moved is where the checkpoint was found.
NOT_COMPARED = ("output_dir", "dry_run", "resume")
# Where null means whatever the checks find: what the run's checkpoint names, first of all.
FOUND = ("model.tokenizer",)


def begin_anew(config: RunConfig) -> str:
    """The words that start a new run from the run's newest weights, in a directory that is free. They name the
    directory of checkpoints, since Hydra reads no value with a second ``=``."""
    former, number = config.output_dir.rstrip("/"), 2
    while Path(f"{former}_{number}").exists():
        number += 1
    return f"init_from={checkpoint_dir(config)} output_dir={former}_{number}"


def _refuse(changes: list[ChangedOption], config: RunConfig, step: int) -> None:
    found = [change for change in changes if change.rule.does == REFUSED]
    if not found:
        return
    what = " and ".join(map(str, found))
    why = "; ".join(dict.fromkeys(each.rule.words for each in found))
    cure = "set it back" if len(found) == 1 else "set them back"
    if all(each.rule.weights_go_on for each in found):
        cure += f", or start a new run from its weights by adding {begin_anew(config)}"
    else:
        cure += ", or choose another output_dir"
    raise ValueError(f"{config.output_dir}, at step {step}, cannot go on with {what}, since {why}: {cure}.")


def _rule(name: str) -> OnResume:
    rule = rule_of(name)
    assert rule is not None, f"nothing says what becomes of {name} on resume"
    return rule


def _without_effect(saved: RunConfig, config: RunConfig, names: Any) -> Iterator[str]:
    """Options of objectives that are not enabled before and now; of those that come or go ``enabled`` says it all."""
    for key in known():
        options = f"objective.{key}."
        if not (getattr(saved.objective, key).enabled and getattr(config.objective, key).enabled):
            yield from (name for name in names if name.startswith(options) and name != f"{options}enabled")


def _set(config: Any, name: str, value: Any) -> None:
    *parts, last = name.split(".")
    for part in parts:
        config = getattr(config, part)
    setattr(config, last, value)


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{shown(each)}' for key, each in value.items())}}}"
    return value if isinstance(value, str) else str(value)
