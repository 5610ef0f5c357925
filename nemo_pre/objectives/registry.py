"""The list of objectives, and what the rest of the house asks of all of them.

Whoever walks over objectives does it here and knows none by name. A package of its own can bring a further one by an
entry point of the group :data:`GROUP`, ``name = "module:Class"``, without a change here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any

from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.objective import Objective, resolve
from nemo_pre.objectives.target import Target

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig

OBJECTIVES = (
    "nemo_pre.objectives.pre:PRe",
    "nemo_pre.objectives.laver:LaVer",
    "nemo_pre.objectives.viral:VIRAL",
)
GROUP = "nemo_pre.objectives"


@cache
def known() -> Mapping[str, type[Objective]]:
    """All objectives by name, in the order in which their terms run.

    Raises:
        ValueError: two have one name, or one of another package cannot be imported.
    """
    found: dict[str, type[Objective]] = {}
    for where in OBJECTIVES:
        _add(found, resolve(where), where)
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        try:
            objective = point.load()
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"The objective '{point.name}' cannot be imported from {point.value} ({error}): mend or uninstall the "
                f"package that names it."
            ) from error
        _add(found, objective, point.value)
    return found


def _add(found: dict[str, type[Objective]], objective: type[Objective], where: str) -> None:
    if objective.name in found:
        other = found[objective.name]
        raise ValueError(
            f"Two objectives are called '{objective.name}' ({other.__module__} and {where}): rename one of them."
        )
    found[objective.name] = objective


def enabled(config: RunConfig) -> list[Objective]:
    """The objectives that a run has enabled."""
    return [objective(config) for name, objective in known().items() if getattr(config.objective, name).enabled]


def wanted_targets(config: RunConfig) -> dict[str, Target]:
    """The frozen vision models that the run's objectives compare with, by the objective's name."""
    return {objective.name: target for objective in enabled(config) if (target := objective.target()) is not None}


def term_metrics() -> tuple[TermMetric, ...]:
    """What all objectives record of themselves."""
    return tuple(metric for objective in known().values() for metric in objective.metrics)


def compared_metrics() -> tuple[TermMetric, ...]:
    """Metrics of all objectives by which runs are compared."""
    return tuple(metric for metric in term_metrics() if metric.compared)


def metric_prefixes() -> tuple[str, ...]:
    """What the names of all objectives' metrics begin with."""
    return tuple(f"{name}/" for name in known())


def trained() -> tuple[str, ...]:
    """What the names of all objectives' trained parameters begin with."""
    return tuple(prefix for objective in known().values() for prefix in objective.trained)


def training_only() -> tuple[str, ...]:
    """What the names of all parameters begin with that inference drops."""
    return tuple(prefix for objective in known().values() for prefix in objective.training_only())


def compared_on_resume() -> tuple[str, ...]:
    """What the names of the parameters begin with whose shapes a resumed run compares."""
    return tuple(
        prefix
        for objective in known().values()
        for prefix in (
            objective.training_only() if objective.compared_on_resume is None else objective.compared_on_resume
        )
    )


def enabled_options(objective_options: Any) -> Iterator[tuple[type[Objective], Any]]:
    """The enabled objectives of a configuration's ``objective`` part, also a saved one's, and their options."""
    for name, objective in known().items():
        options = getattr(objective_options, name)
        if options.enabled:
            yield objective, options
