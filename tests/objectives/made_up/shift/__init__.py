"""A made-up objective: what a linear head makes of a layer's visual tokens is to be one vector, all of the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.objective import FROM_NEXT_STEP, LayerObjective
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.options import choice, number


@dataclass
class ShiftConfig:
    enabled: bool = False
    weight: float = number(0.3, least=0)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layers: list[int] | None = None
    head_width: int = number(8, least=1)
    direction: str = choice("up", {"up": "towards one", "down": "towards minus one"})


class Shift(LayerObjective):
    name = "shift"
    title = "Shift"
    source = "Shift (nobody's, nowhere)"
    Options = ShiftConfig
    term = "shift.term:ShiftTerm"
    cost = "shift.cost:ShiftCost"
    metrics = (TermMetric("shift/loss", "Shift: distance", progress="shifted", zero=True),)
    trained = ("shift_head.",)
    on_resume = {"weight": FROM_NEXT_STEP, "schedule": FROM_NEXT_STEP, "direction": FROM_NEXT_STEP}

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.options.direction == "down" and self.options.head_width % 2:
            yield f"{self.option('head_width')}={self.options.head_width} must be even to go down."


class Uncounted(LayerObjective):
    name = "uncounted"
    title = "Uncounted"
    source = "Uncounted (nobody's, nowhere)"
    Options = ShiftConfig
    term = "shift.term:ShiftTerm"
