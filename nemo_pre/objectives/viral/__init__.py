"""VIRAL, Visual Representation Alignment (arXiv 2509.07979): a middle decoder layer's visual tokens are aligned with
the patch features of a frozen vision model, directly by their cosine or by how alike they are among themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.config.vision_families import is_native
from nemo_pre.objectives.metrics import TermMetric
from nemo_pre.objectives.objective import FROM_NEXT_STEP, PLACE, TRAINED, LayerObjective, other_layers
from nemo_pre.objectives.schedules import ScheduleConfig
from nemo_pre.objectives.target import Target
from nemo_pre.options import applied, choice, number, place

NAME = "viral"


@dataclass
class ViralConfig:
    """Options of VIRAL (arXiv 2509.07979); the defaults are the paper's, but for the target, which has to be named."""

    enabled: bool = False  # whether the run has it
    weight: float = number(0.5, least=0)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    layers: list[int] | None = None  # 1-based decoder layers; null: L/2; -1: the last
    form: str = choice(
        "direct",
        {"direct": "minus the cosine to the target", "similarity": "squared difference of cosines within an image"},
    )
    compared: str = choice("head", {"head": "what the head makes of a token", "hidden": "the token, similarity only"})
    target: str = choice(
        "external", {"external": "features of the vision model target_path", "encoder": "the model's own encoder"}
    )
    target_path: str | None = place(None)  # HF vision model for target=external
    target_image_size: int | None = number(None, least=1)  # pixels it sees; null: its own
    target_filter: str = choice("bilinear", ("bilinear", "bicubic"))  # of the resizing to that
    target_features: str | None = place(None)  # directory of `nemo-pre data features of=objective.viral`: its output
    shared_head: bool = True  # one head for all layers, which must lie in one model chunk; else one each
    head_hidden_width: int = number(2048, least=1)
    head_depth: int = number(3, least=1)  # linear layers, SiLU between them


class VIRAL(LayerObjective):
    name = NAME
    title = "VIRAL"
    source = "VIRAL, Visual Representation Alignment ([arXiv 2509.07979](https://arxiv.org/abs/2509.07979))"
    Options = ViralConfig
    term = "nemo_pre.objectives.viral.term:ViralTerm"
    cost = "nemo_pre.objectives.viral.cost:ViralCost"
    metrics = (
        TermMetric("viral/loss", "VIRAL: its loss", progress="viral"),
        TermMetric("viral/weight", "VIRAL: its weight", compared=False, zero=True, smoothed=False),
    )
    trained = ("viral_head.", "viral_heads.")
    on_resume = {
        **dict.fromkeys(("weight", "schedule", "form", "target_image_size", "target_filter"), FROM_NEXT_STEP),
        **dict.fromkeys(("target_path", "target_features"), PLACE),
        **dict.fromkeys(("compared", "target", "shared_head", "head_hidden_width", "head_depth"), TRAINED),
        "layers": applied("other words for the same layers", other_layers, "for other layers", TRAINED.words),
    }

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        viral, vision = self.options, self.config.model.vision
        if viral.target == "external" and not (viral.target_path or viral.target_features):
            yield f"{self.option('target')}=external needs {self.option('target_path')}, a vision model's directory."
        if viral.target == "external" and is_native(vision):
            yield (
                f"{self.option('target')}=external needs a fixed resolution, not model.vision.family={vision.family}: "
                f"set it to encoder."
            )
        if viral.form == "direct" and viral.compared == "hidden":
            yield (
                f"{self.option('compared')}=hidden has not the target's width: set it to head, or "
                f"{self.option('form')}=similarity."
            )
        chunks = self.chunks_with_layers()
        if has_head(viral) and viral.shared_head and chunks > 1:
            yield (
                f"{self.option('shared_head')}=true needs {self.option('layers')} in one model chunk, and "
                f"{list(self.tapped_layers())} lie in {chunks}: set it to false, or choose layers of one chunk."
            )

    def chunks_with_layers(self) -> int:
        """How many model chunks of the pipeline have a target layer; 1 where the layout itself cannot be."""
        from nemo_pre.planner.chunks import chunks_of_stages, layers_problem

        if layers_problem(self.config) is not None:
            return 1
        chunks = [chunk for stage in chunks_of_stages(self.config) for chunk in stage]
        return sum(any(layer - 1 in chunk.layers for layer in self.tapped_layers()) for chunk in chunks)

    def ignored(self) -> Iterator[str]:
        yield from super().ignored()
        viral, default = self.options, ViralConfig()
        if viral.target == "encoder":
            for name in ("target_path", "target_image_size", "target_features"):
                if getattr(viral, name) is not None:
                    yield f"{self.option(name)} has no effect with {self.option('target')}=encoder."
        if not has_head(viral):
            for name in ("shared_head", "head_hidden_width", "head_depth"):
                if getattr(viral, name) != getattr(default, name):
                    yield f"{self.option(name)} has no effect with {self.option('compared')}=hidden."

    def target(self) -> Target | None:
        return external_target(self.options) if self.options.target == "external" else None


def has_head(viral: Any) -> bool:
    """Whether something is trained between a layer's tokens and the comparison."""
    return viral.compared == "head"


def external_target(viral: ViralConfig) -> Target:
    """The model behind ``target=external``."""
    return Target(
        NAME,
        "objective.viral.target",
        viral.target_path,
        viral.target_image_size,
        viral.target_filter,
        viral.target_features,
    )
