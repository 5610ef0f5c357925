"""What the frozen vision model of an objective costs: it runs on the first stage, in float32, without a gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from nemo_pre.objectives.target import Target


@dataclass(frozen=True)
class TargetCost:
    """What one frozen model costs.

    Attributes:
        width: of its features; None: not known here.
        parameters: of the model, none where its features are read.
        flops: of a picture.
        problem: why nothing is known of it, as one sentence; None where it is.
    """

    width: int | None
    parameters: int = 0
    flops: float = 0.0
    problem: str | None = None


@cache
def target_cost(target: Target) -> TargetCost:
    """Counted from the model's configuration, or from the features that are read, where they are within reach."""
    from nemo_pre.data.features import read_features
    from nemo_pre.terms.vision_facts import vision_facts

    try:
        if target.features is not None:
            return TargetCost(read_features(target.features, target.option("features")).width)
        facts = vision_facts(replace(target, path=_directory(target)))
    except ValueError as error:
        return TargetCost(None, problem=f"The frozen model of {target.objective} is not counted: {error}")
    return TargetCost(facts.width, facts.parameters, facts.flops)


def _directory(target: Target) -> str:
    """Where the model lies on this machine. A plan asks no hub.

    Raises:
        ValueError: it lies nowhere.
    """
    from huggingface_hub import try_to_load_from_cache

    path = str(target.path)
    if Path(path).expanduser().is_dir():
        return str(Path(path).expanduser())
    cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
    if isinstance(cached, str):
        return str(Path(cached).parent)
    raise ValueError(f"{target.option('path')}={path} is neither a directory nor in the hub's cache here.")
