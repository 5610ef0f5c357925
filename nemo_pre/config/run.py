"""A whole run's configuration: the parts of :mod:`nemo_pre.config.schema` and the options of every known objective."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from nemo_pre.config.schema import (
    ClusterConfig,
    DataConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    TrainerConfig,
)
from nemo_pre.objectives.registry import known
from nemo_pre.options import choice, number, place, seed_number


@dataclass
class _LanguageObjective:
    """What is there without any further objective."""

    name: str = "none"  # of the recipe
    lm_weight: float = number(1.0, least=0)  # of the language model's loss


def _objective_config() -> type:
    """The dataclass with the language model's weight and, under its name, the options of every known objective."""
    fields: list[Any] = [
        (name, objective.Options, field(default_factory=objective.Options)) for name, objective in known().items()
    ]
    made = dataclasses.make_dataclass("ObjectiveConfig", fields, bases=(_LanguageObjective,))
    made.__doc__ = "L = lm_weight x L_LM + what the enabled objectives add, each weighted by its own options."
    made.__module__ = __name__  # where ranks, to which a configuration is sent, find it
    return made


if TYPE_CHECKING:
    ObjectiveConfig = Any
else:
    ObjectiveConfig = _objective_config()


@dataclass
class RunConfig:
    """One run. ``nemo-pre train experiment=NAME`` fills it; the resolved copy is saved with the run."""

    name: str = MISSING  # of the run: its folder's, and its job's
    seed: int = seed_number(1234)  # of new weights, masks and whatever else is drawn but the order of the data
    platform: str = choice("auto", ("auto", "cpu", "gpu"))
    output_dir: str = place("runs/${name}")  # everything that the run writes
    dry_run: bool = False  # check everything, say what would be trained, and end
    init_from: str | None = place(
        None
    )  # weights to start from: a former stage's checkpoint, or what `nemo-pre import` wrote
    vision_from: str | None = place(
        None
    )  # weights the encoder starts with: a vision tower's directory, or digits, which comes along; null: random
    resume: bool = True  # continue from the newest checkpoint in output_dir
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    experiment: Any = None  # set by the defaults list; the name of the experiment file
