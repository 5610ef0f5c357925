"""A loss term on the ranks: what an objective does, and when whatever trains calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from nemo_pre.objectives.schedules import ScheduleConfig, ramp
from nemo_pre.options import value_problems

if TYPE_CHECKING:
    from nemo_pre.objectives.scale import StepPlan
    from nemo_pre.parallel.sequence_layout import SequenceLayout
    from nemo_pre.parallel.token_streams import VisualBranch
    from nemo_pre.terms.training import Training, VisualModelConfig


@dataclass(frozen=True)
class Weight:
    """The weight of a term in the loss, and how it changes over training."""

    value: float
    schedule: ScheduleConfig

    def at(self, step: int) -> float:
        """The weight after ``step`` optimizer steps."""
        schedule = self.schedule
        return self.value * ramp(schedule.kind, step, schedule.start, schedule.steps)


class Term:
    """One objective's part of the loss on this rank.

    Methods are called in the order in which they stand here, on every rank, whether or not the rank's stage has a part
    in the term. A term injects its gradient where it arises
    (:func:`nemo_pre.parallel.auxiliary_gradient.backpropagate_with`), scaled by
    :func:`nemo_pre.objectives.scale.term_scale`.

    Args:
        options: the objective's.
        seed: the run's, of initial weights and of whatever the term draws.

    Raises:
        ValueError: an option has a value that its field does not allow.

    Attributes:
        name: the objective's.
    """

    name: ClassVar[str]

    def __init__(self, options: Any, seed: int = 0) -> None:
        for problem in value_problems(options, f"objective.{self.name}."):
            raise ValueError(problem)
        self.options, self.seed = options, seed

    def weights(self) -> Mapping[str, Weight]:
        """The terms it adds to the loss, by the names under which every step's plan has their weights."""
        raise NotImplementedError

    def prepare(self, model: VisualModelConfig) -> None:
        """Ask the model, before it is built, for what the term needs; see ``model.parts``."""

    def install(self, training: Training) -> None:
        """Install the term when the model is there with its initial weights; those of a resumed checkpoint come
        later."""

    def plan_branches(
        self, training: Training, batches: Sequence[dict[str, Any]], layouts: Sequence[SequenceLayout]
    ) -> list[VisualBranch] | None:
        """A second sequence for every micro-batch of the coming step, all of one length; None: the term has none."""
        return None

    def counts(self, layout: SequenceLayout, branch: VisualBranch | None) -> Mapping[str, int]:
        """What the term is averaged over beside visual tokens and images, in one micro-batch of this replica. The plan
        has the sums over the global batch under the same names."""
        return {}

    def start_step(self) -> None:
        """Get ready before the first micro-batch of a step."""

    def forget_step(self) -> None:
        """Drop what was gathered, after a pass over the step's micro-batches that is not the step itself."""

    def end_step(self, plan: StepPlan) -> Mapping[str, Tensor | float]:
        """The metrics to record, the same on every rank, by their whole names: asked after the step's last backward
        pass. One of which the step has nothing, such as a mean over no tokens, is left out, and not recorded then."""
        return {}

    def after_update(self, training: Training) -> None:
        """Follow the parameters after the optimizer has moved them."""

    def finish(self) -> None:
        """Clean up when training ends, before the last checkpoint is read."""

    def remove(self) -> None:
        """Take everything off the model again but the parameters it was given."""
