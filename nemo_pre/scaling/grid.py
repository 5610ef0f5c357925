"""A grid of runs: experiments x GPUs x layouts x regularizers x target depths x how the batch grows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

from nemo_pre.objectives.objective import LayerObjective, Objective
from nemo_pre.objectives.registry import enabled_options
from nemo_pre.run_files.json_files import read_text

RECIPE = "recipe"  # as a regularizer or a layout: what the experiment says
BATCHES = ("strong", "weak")  # the recipe's at every number of GPUs | in proportion to the GPUs, from the fewest on


@dataclass(frozen=True)
class Point:
    """One run.

    Attributes:
        layout: ``best`` of the planner's search, ``recipe`` (the experiment's own), or a name of recipes/parallel;
            replicas follow from ``gpus``.
        regularizer: ``recipe``, or a name of recipes/objective.
        depth: the objective's target layer as a part of the decoder's depth; None: its own.
        growth: of the batch beside the recipe's.
        overrides: options that all runs of the grid share.
    """

    experiment: str
    gpus: int
    layout: str
    regularizer: str
    depth: float | None
    batch: str
    growth: float
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        parts = [self.experiment, self.regularizer, f"{self.gpus}gpus", self.layout, self.batch]
        return "-".join([*parts, *([] if self.depth is None else [f"depth{self.depth:g}"])])

    @property
    def words(self) -> list[str]:
        """The options of ``nemo-pre train``, but for layout, batch and target layer."""
        layout = [] if self.layout in ("best", RECIPE) else [f"parallel={self.layout}"]
        return [f"experiment={self.experiment}", *regularizer_words(self.regularizer), *layout, *self.overrides]


@dataclass(frozen=True)
class Grid:
    """What a study compares; fields are the keys of its YAML file and the words of the command line."""

    experiments: list[str] = field(default_factory=list)
    gpus: list[int] = field(default_factory=list)
    layouts: list[str] = field(default_factory=lambda: ["best"])
    regularizers: list[str] = field(default_factory=lambda: ["recipe"])
    depths: list[float] = field(default_factory=list)
    batches: list[str] = field(default_factory=lambda: ["strong"])
    overrides: list[str] = field(default_factory=list)

    def points(self) -> list[Point]:
        """Every combination; depths only with regularizers that have target layers.

        Raises:
            ValueError: an axis is empty, or a value is unknown.
        """
        self._check()
        found = []
        for name, regularizer, batch, layout, gpus in itertools.product(
            self.experiments, self.regularizers, self.batches, self.layouts, self.gpus
        ):
            growth = gpus / min(self.gpus) if batch == "weak" else 1.0
            for depth in self.depths if self.depths and has_target_layers(regularizer) else [None]:
                found.append(
                    Point(name, gpus, layout, regularizer, depth, batch, growth, tuple(self.overrides)),
                )
        return found

    def _check(self) -> None:
        import recipes

        known = {
            "experiments": recipes.choices("experiment"),
            "layouts": ["best", RECIPE, *recipes.choices("parallel")],
            "regularizers": [RECIPE, *recipes.choices("objective")],
            "batches": list(BATCHES),
        }
        for axis in ("experiments", "gpus"):
            if not getattr(self, axis):
                raise ValueError(f"A scaling study needs {axis}=[...]: name one at least, or choose study=sizes.")
        for axis, choices in known.items():
            for value in getattr(self, axis):
                if value not in choices:
                    raise ValueError(f"{axis} has '{value}': choose of {', '.join(choices)}.")
        if any(gpus < 1 for gpus in self.gpus):
            raise ValueError(f"gpus={self.gpus} must be 1 or more.")
        if any(not 0 < depth <= 1 for depth in self.depths):
            raise ValueError(f"depths={self.depths} must be above 0 and at most 1.")


@cache
def _objectives(regularizer: str) -> tuple[type[Objective], ...]:
    """The objectives that a file of recipes/objective enables."""
    from nemo_pre.config.compose import compose_config

    objective = compose_config([f"objective={regularizer}"]).objective
    return tuple(kind for kind, _ in enabled_options(objective))


def regularizer_words(regularizer: str) -> list[str]:
    """The options of ``nemo-pre train`` that give a run this regularizer, with what it needs of the model."""
    if regularizer == RECIPE:
        return []
    needed = [word for objective in _objectives(regularizer) for word in objective.model_words]
    return [f"objective={regularizer}", *dict.fromkeys(needed)]


def has_target_layers(regularizer: str) -> bool:
    """Whether a target depth may be asked of it; of a recipe it is known when the recipe is composed."""
    return regularizer == RECIPE or any(issubclass(kind, LayerObjective) for kind in _objectives(regularizer))


SIZES = ("qwen25_1_5b", "qwen25_3b", "qwen25_7b", "qwen25_14b", "qwen25_32b", "llama3_70b")
STUDIES = {
    "sizes": Grid(
        experiments=[f"siglip2_{model}_laver_stage2_knowledge" for model in SIZES],
        gpus=[64, 256, 1024, 4096],
        regularizers=["none", "pre", "laver"],
        batches=["strong", "weak"],
        overrides=["trainer.global_batch_size=1024"],
    ),
    # Which part of the depth PRe's target layer should lie at was left open by arXiv 2603.20808.
    "target_depth": Grid(
        experiments=[
            "clip_qwen25_3b_stage2_full_pre",
            "siglip2_qwen25_7b_stage2_full_pre",
            "siglip2_qwen25_14b_stage2_full_pre",
            "siglip2_qwen25_32b_stage2_full_pre",
        ],
        gpus=[64],
        depths=[0.25, 0.375, 0.5, 0.625, 0.75, 1.0],
    ),
}


AXES = tuple(axis.name for axis in fields(Grid))
_KINDS: dict[str, type] = {"gpus": int, "depths": float}


def read_grid(file: str | Path) -> Grid:
    """A YAML file's grid.

    Raises:
        ValueError: the file cannot be read, or has other keys than a grid.
    """
    import yaml

    try:
        values = yaml.safe_load(read_text(file, "a YAML file"))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no grid: give it the keys {', '.join(AXES)}.")
    for name in values:
        if name not in AXES:
            raise ValueError(f"{file} has the key '{name}': choose of {', '.join(AXES)}.")
    return Grid(**{axis: axis_values(axis, listed) for axis, listed in values.items()})


def axis_values(axis: str, values: Any) -> list[Any]:
    """A list, or words with commas between them, as the axis' kind.

    Raises:
        ValueError: a number was expected.
    """
    listed: Sequence[Any] = values if isinstance(values, list) else str(values).strip("[]").split(",")
    kind = _KINDS.get(axis, str)
    try:
        return [kind(value.strip() if isinstance(value, str) else value) for value in listed if value != ""]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{axis}={values} must be numbers with commas between them.") from error
