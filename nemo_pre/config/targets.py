"""What objectives compare visual tokens with beside the model itself: features of frozen vision models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemo_pre.config.schema import PReConfig, RunConfig
from nemo_pre.config.vision_families import is_native


@dataclass(frozen=True)
class Target:
    """A frozen vision model whose patch features an objective wants of every picture.

    Attributes:
        name: of the objective, and of its features in a batch.
        prefix: what the options about this model begin with: those of ``objective.pre.external`` are
            ``objective.pre.external_path``, ``..._image_size`` and ``..._features``.
        path: directory or hub id; None only where features are read.
        image_size: pixels a picture is resized to, a square; None: the model's own.
        image_filter: of that resizing, ``bicubic`` or ``bilinear``.
        features: directory of ``nemo-pre data features of=...``, which is read instead of running the model.
    """

    name: str
    prefix: str
    path: str | None
    image_size: int | None = None
    image_filter: str = "bicubic"
    features: str | None = None

    @property
    def objective(self) -> str:
        """The option group of the objective: the word behind ``of=``."""
        return self.prefix.rpartition(".")[0]

    def option(self, name: str) -> str:
        return f"{self.prefix}_{name}"


def wanted_targets(config: RunConfig) -> dict[str, Target]:
    """The frozen models that the run's objectives look at, by name."""
    found = [target for provider in PROVIDERS if (target := provider(config)) is not None]
    return {target.name: target for target in found}


def target_problems(config: RunConfig, target: Target) -> Iterator[str]:
    """Why the run cannot read features of an objective's model."""
    option = target.option("features")
    if config.data.max_tiles > 1:
        yield f"{option} holds one tile an image, not data.max_tiles={config.data.max_tiles}: set one of them back."
    if is_native(config.model.vision):
        yield f"{option} holds as many tokens for every image, unlike native resolution: set it to null."


def external_anchor(pre: PReConfig) -> Target:
    """The model behind PRe's ``anchor=external``."""
    return Target(
        "pre", "objective.pre.external", pre.external_path, pre.external_image_size, features=pre.external_features
    )


def _of_pre(config: RunConfig) -> Target | None:
    pre = config.objective.pre
    return external_anchor(pre) if pre.enabled and pre.anchor == "external" else None


PROVIDERS: list[Callable[[RunConfig], Target | None]] = [_of_pre]
