"""PRe, Predictive Regularization (arXiv 2603.20808): a middle decoder layer's visual tokens predict, through a 2-layer
MLP and a cosine loss, the stop-gradient visual tokens that entered the language model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from nemo_pre.config.vision_families import is_native
from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.objective import FROM_NEXT_STEP, PLACE, TRAINED, LayerObjective, other_layers
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.objectives.target import Target
from nemo_pre.options import applied, choice, comes_or_goes, fraction, number, place

NAME = "pre"


@dataclass
class PReConfig:
    """Options of PRe (arXiv 2603.20808)."""

    enabled: bool = False  # whether the run has it
    weight: float = number(0.5, least=0)  # lambda
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layers: list[int] | None = None  # 1-based decoder layers; null: L/2; -1: the last
    variant: str = choice("patch", {"patch": "every visual token", "global": "mean-pooled per image"})
    anchor: str = choice(
        "pre_llm",
        {
            "pre_llm": "what enters the language model",
            "pre_projector": "the encoder's features",
            "external": "features of the vision model external_path",
        },
    )
    external_path: str | None = place(None)  # HF vision model for anchor=external
    external_image_size: int | None = number(None, least=1)  # pixels; null: the external model's own
    external_features: str | None = place(
        None
    )  # directory of `nemo-pre data features of=objective.pre`: the model's output
    ema_momentum: float | None = fraction(None)  # moving anchor: EMA of the projector; null: the live projector
    head_hidden_ratio: float = number(0.25, above=0)  # hidden width of the MLP as a fraction of the decoder's width
    head_activation: str = choice("gelu", ("gelu", "relu", "silu"))
    head_norm: bool = False  # LayerNorm before the MLP


class PRe(LayerObjective):
    name = NAME
    title = "PRe"
    source = "PRe, Predictive Regularization ([arXiv 2603.20808](https://arxiv.org/abs/2603.20808))"
    Options = PReConfig
    term = "nemo_pre.objectives.pre.term:PReTerm"
    cost = "nemo_pre.objectives.pre.cost:PReCost"
    metrics = (
        TermMetric("pre/cosine", "PRe: cosine of prediction and anchor", progress="pre/cosine", at_most=1),
        TermMetric("pre/weight", "PRe: its weight", compared=False, zero=True, smoothed=False),
    )
    trained = ("pre_heads.",)
    averaged = ("ema_projection.",)
    on_resume = {
        **dict.fromkeys(("weight", "schedule", "variant", "external_image_size", "head_activation"), FROM_NEXT_STEP),
        **dict.fromkeys(("external_path", "external_features"), PLACE),
        **dict.fromkeys(("anchor", "head_hidden_ratio", "head_norm"), TRAINED),
        "layers": applied("other words for the same layers", other_layers, "for other layers", TRAINED.words),
        "ema_momentum": applied(
            FROM_NEXT_STEP.words, comes_or_goes, "from or to null", "the average lies in the checkpoint or does not"
        ),
    }

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        pre = self.options
        if pre.anchor == "external" and not (pre.external_path or pre.external_features):
            yield f"{self.option('anchor')}=external needs {self.option('external_path')}, a vision model's directory."
        if pre.ema_momentum is not None and pre.anchor != "pre_llm":
            yield (
                f"{self.option('ema_momentum')} averages the projector and needs {self.option('anchor')}=pre_llm, "
                f"not {pre.anchor}."
            )
        vision = self.config.model.vision
        if is_native(vision) and pre.anchor == "external":
            yield (
                f"{self.option('anchor')}=external needs a fixed resolution, not model.vision.family={vision.family}: "
                f"set it to pre_llm or pre_projector."
            )

    def ignored(self) -> Iterator[str]:
        pre = self.options
        if pre.anchor != "external" and (pre.external_path or pre.external_image_size or pre.external_features):
            yield (
                f"{self.option('external_path')}, external_image_size and external_features have no effect with "
                f"{self.option('anchor')}={pre.anchor}."
            )
        yield from super().ignored()

    def target(self) -> Target | None:
        return external_anchor(self.options) if self.options.anchor == "external" else None


def external_anchor(pre: PReConfig) -> Target:
    """The model behind ``anchor=external``."""
    return Target(
        NAME, "objective.pre.external", pre.external_path, pre.external_image_size, features=pre.external_features
    )
