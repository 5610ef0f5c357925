"""Where a run's weights come from, and what happens where a checkpoint's training-only parts are not the run's.

What objectives train beside the model, such as heads, lies in checkpoints as parameters of its own. A new run takes
over whatever ``init_from`` has. One that continues needs all of them, since Megatron restores optimizer states all or
none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nemo_pre.checkpoint_files.inspection import damage_or_danger
from nemo_pre.checkpoint_files.metadata import weights_only
from nemo_pre.config.run import RunConfig
from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader
from nemo_pre.launch.environment import is_first_rank
from nemo_pre.objectives.registry import compared_on_resume, known
from nemo_pre.run_files.checkpoints import damage_of, former_stage, mark_damaged
from nemo_pre.run_files.continuing import begin_anew, continuation
from nemo_pre.run_files.saved_config import check_same_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StartPoint:
    """The checkpoints that a run begins with.

    Attributes:
        resume_from: checkpoint to continue from, with optimizer, step and data position.
        weights_from: checkpoint to take the weights of, and nothing else.
    """

    resume_from: str | None = None
    weights_from: str | None = None


def start_point(config: RunConfig, wanted: Mapping[str, tuple[int, ...]]) -> StartPoint:
    """Decide where the run starts, and say so.

    Args:
        config: the run.
        wanted: names and shapes of the training-only parameters of the whole model.

    Raises:
        ValueError: the run cannot go on from its checkpoint, a head in the one it starts from has another shape, or
            that one lacks a weight of the model, or has one of another.
    """
    goes_on = continuation(config, _damage_on_record)
    source = None
    if goes_on is not None:
        source = goes_on.checkpoint
    elif config.init_from:
        source = former_stage(config.init_from, damaged=partial(damage_or_danger, wanted=weights_only))
    if source is None:
        return StartPoint()
    check_same_weights(config.model, source)
    checkpoint = CheckpointReader(source)
    checkpoint.check(config.model)  # Megatron would leave what is missing at its initial value
    found = _training_only(checkpoint)
    for name, shape in wanted.items():
        if name in found and found[name] != shape:
            raise ValueError(
                f"{name} has shape {list(found[name])} in {source} but {list(shape)} in this run: set the options of "
                f"{_owner(name)} as they were, or start from a checkpoint without it."
            )
    missing, unused = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if goes_on is not None:
        if missing or unused:
            what = f"has no {_briefly(missing)}" if missing else f"has {_briefly(unused)}, which this run does not use"
            raise ValueError(
                f"{config.output_dir} cannot go on from step {goes_on.step}, since {source} {what}: set the options "
                f"of {_owner([*missing, *unused][0])} as they were, or start a new run from its weights by adding "
                f"{begin_anew(config)}."
            )
        log.info("Resuming from %s.", source)
        return StartPoint(resume_from=source)
    if missing:
        log.warning("%s has no %s: they start from their initial weights.", source, _briefly(missing))
    if unused:
        log.warning("%s has %s, which this run does not use.", source, _briefly(unused))
    log.info("Starting from the weights of %s.", source)
    return StartPoint(weights_from=source)


def _damage_on_record(checkpoint: Path) -> str:
    """What is wrong with a checkpoint of the run's own, agreed by all ranks. The first leaves a mark, or the run would
    save its own of the same step beside it."""
    damage = damage_or_danger(checkpoint)
    if damage and is_first_rank() and not damage_of(checkpoint):
        mark_damaged(checkpoint, damage)
    return damage


def _training_only(checkpoint: CheckpointReader) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the training-only parameters in a checkpoint."""
    named = {key.removeprefix("module."): shape for key, (shape, _) in checkpoint.tensors().items()}
    compared = compared_on_resume()
    return {name: shape for name, shape in named.items() if name.startswith(compared)}


def _briefly(names: list[str]) -> str:
    """The modules of these parameters; of a list of modules, such as heads by layer, each by itself."""
    modules = set()
    for name in names:
        first, *rest = name.split(".")
        modules.add(f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first)
    return ", ".join(sorted(modules))


def _owner(name: str) -> str:
    """The objective that adds the parameter called ``name``, as a user writes it."""
    return next(f"objective.{key}" for key, kind in known().items() if name.startswith(kind.training_only()))
