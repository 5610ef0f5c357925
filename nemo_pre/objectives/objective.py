"""What an objective is: everything the rest of the house asks of one, in one place.

An :class:`Objective` is the description: options and their rules, words, metrics, names of parameters, files,
pictures. What runs on the ranks is its *term* (:mod:`nemo_pre.terms.term`), what a plan counts its *cost*
(:mod:`nemo_pre.objectives.cost`). Both are named as ``"module:Class"`` and imported when they are needed, since the
command line, the checks and the planner never import torch.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.schedules import ScheduleConfig, ignored_schedule_options
from nemo_pre.objectives.target import Target
from nemo_pre.options import OnResume, applied, changed_fields, refused

if TYPE_CHECKING:
    from nemo_pre.config.run import RunConfig
    from nemo_pre.objectives.cost import Cost
    from nemo_pre.terms.term import Term

# What becomes of options when a run continues with other values; for the ``on_resume`` of objectives.
FROM_NEXT_STEP = applied("from the next step on")
PLACE = applied("a name, or where something lies")
TRAINED = refused("the checkpoint has what the former value trains, and its optimizer states are taken all or none")
UNDECLARED = refused("the objective does not say what becomes of it")


class Objective:
    """One enabled objective of a run; the class says what all runs of it share.

    Args:
        config: the run's.

    Attributes:
        name: its key under ``objective.`` in a configuration, and what stands before the slash of its metrics.
        title: its name in sentences, tables and charts.
        source: what it is and where it was published, for the cards of exported models.
        Options: the dataclass of its options, with ``enabled``; rules stand at the fields
            (:mod:`nemo_pre.options`).
        term: ``"module:Class"`` of what runs on the ranks; the class is called with the options and the run's seed.
        cost: ``"module:Class"`` of what a plan counts; None: a plan says that it does not count this objective.
        metrics: what its term records, and how people read it.
        trained: what the names of the parameters begin with that it trains at ``optim.lr_heads`` and inference drops.
        averaged: the same of moving averages, which no optimizer sees.
        compared_on_resume: names whose shapes a resume compares; None: all of the two above. A teacher with the names
            and shapes of the model's own layers can leave those out.
        on_resume: what becomes of each option when a run continues with another value of it; an option's name stands
            for all those inside it too. One that is not there is not changed.
        model_words: the options that give a model what the objective needs of it, such as ``model.attention=mixed``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[str]
    Options: ClassVar[type]
    term: ClassVar[str]
    cost: ClassVar[str | None] = None
    metrics: ClassVar[tuple[TermMetric, ...]] = ()
    trained: ClassVar[tuple[str, ...]] = ()
    averaged: ClassVar[tuple[str, ...]] = ()
    compared_on_resume: ClassVar[tuple[str, ...] | None] = None
    on_resume: ClassVar[Mapping[str, OnResume]] = {}
    model_words: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.options: Any = getattr(config.objective, self.name)

    # --- rules ------------------------------------------------------------------------------------------------------

    def problems(self) -> Iterator[str]:
        """Every reason to refuse the run that one field alone cannot tell, as one sentence each. Fields' own rules
        hold when this is asked."""
        yield from ()

    def ignored(self) -> Iterator[str]:
        """Options of the enabled objective that are set and have no effect, as one sentence each."""
        for field in dataclasses.fields(self.options):
            value = getattr(self.options, field.name)
            if isinstance(value, ScheduleConfig):
                yield from ignored_schedule_options(value, self.option(field.name))

    @classmethod
    def ignored_when_off(cls, options: Any) -> Iterator[str]:
        """Options of the objective that are set although it is not enabled."""
        if changed := changed_fields(options):
            yield f"objective.{cls.name}.{', '.join(changed)} have no effect with objective.{cls.name}.enabled=false."

    def target(self) -> Target | None:
        """The frozen vision model whose patch features it compares visual tokens with; None where there is none."""
        return None

    @classmethod
    def rule_on_resume(cls, field: str) -> OnResume:
        """What becomes of the option ``field``, such as ``schedule.start``, when a run goes on with another value."""
        if field == "enabled":
            return TRAINED
        while field and field not in cls.on_resume:
            field = field.rpartition(".")[0]
        return cls.on_resume.get(field, UNDECLARED)

    def files(self) -> Iterator[tuple[str, str, str]]:
        """What must lie on disk or within reach before the run starts: option, directory or hub id, a file in it."""
        target = self.target()
        if target is not None and target.path is not None:
            for name in ("config.json", "preprocessor_config.json"):
                yield target.option("path"), target.path, name

    def looks_at_pictures(self) -> bool:
        """Whether its term needs the pixels of images, also where the encoder's features are read instead."""
        target = self.target()
        return target is not None and target.features is None

    def option(self, field: str) -> str:
        """The full name of one of its options."""
        return f"objective.{self.name}.{field}"

    # --- words ------------------------------------------------------------------------------------------------------

    def summary(self) -> str:
        """What a checked run prints of the objective, on one line with the other objectives."""
        return self.described(self.title, self.options)

    @classmethod
    def card(cls, options: Any) -> str:
        """What the card of an exported model says of the objective."""
        return cls.described(cls.source, options)

    @classmethod
    def described(cls, title: str, options: Any) -> str:
        """``title`` with the weight, where the options have one."""
        return f"{title}, weight {options.weight:g}" if hasattr(options, "weight") else title

    # --- the rest, imported when asked -------------------------------------------------------------------------------

    @classmethod
    def term_class(cls) -> type[Term]:
        """The class that runs on the ranks. Imports torch."""
        return resolve(cls.term)

    def build_term(self) -> Term:
        """The run's term. Imports torch."""
        return self.term_class()(self.options, self.config.seed)

    def build_cost(self) -> Cost | None:
        """What a plan counts of the objective; None where nothing is counted."""
        return None if self.cost is None else resolve(self.cost)(self)

    def tapped_layers(self) -> tuple[int, ...]:
        """The decoder layers, 1-based, whose output its term looks at."""
        return ()

    @classmethod
    def training_only(cls) -> tuple[str, ...]:
        """What the names of all the objective's parameters begin with."""
        return (*cls.trained, *cls.averaged)


class LayerObjective(Objective):
    """An objective on decoder layers' visual tokens: its options have ``layers``, see :func:`target_layers`."""

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        try:
            self.tapped_layers()
        except ValueError as error:
            yield str(error)

    def summary(self) -> str:
        layers = ", ".join(map(str, self.tapped_layers()))
        return self.described(f"{self.title} at layer {layers}", self.options)

    def tapped_layers(self) -> tuple[int, ...]:
        return target_layers(self.options.layers, self.config.model.language.num_layers, self.option("layers"))


def other_layers(before: list[int] | None, now: list[int] | None, config: RunConfig) -> bool:
    """Whether two values of an option ``layers`` name different layers of the run's model."""
    num_layers = config.model.language.num_layers
    return target_layers(before, num_layers, "layers") != target_layers(now, num_layers, "layers")


def target_layers(layers: list[int] | None, num_layers: int, option: str) -> tuple[int, ...]:
    """Target layers, 1-based and sorted: L/2 by default, -1 for the last.

    Args:
        option: the name under which a user set them.

    Raises:
        ValueError: one is not in the model or named twice.
    """
    found = [num_layers // 2] if layers is None else [num_layers if layer == -1 else layer for layer in layers]
    if not found or len(set(found)) < len(found) or not all(1 <= layer <= num_layers for layer in found):
        raise ValueError(
            f"{option}={layers} must name different layers between 1 and {num_layers}, or -1 for the last."
        )
    return tuple(sorted(found))


def resolve(where: str) -> Any:
    """What ``"module:Name"`` names."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)
