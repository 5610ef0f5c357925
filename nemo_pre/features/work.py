"""What there is to do for a directory of features: of which model, how, and shard by shard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nemo_pre.config.derived import num_visual_tokens
from nemo_pre.config.run import RunConfig
from nemo_pre.data.features import FeatureFile
from nemo_pre.data.manifest import Shard
from nemo_pre.objectives.registry import wanted_targets
from nemo_pre.objectives.target import Target


@dataclass
class Options:
    """The words of ``nemo-pre data features`` that are not the run's.

    Attributes:
        dtype: of the features, and what the encoder computes in.
        part: (number from 1, of how many): the shards this process takes.
        batch: images the encoder runs on at a time.
        of: the objective whose frozen model is run; None: the run's encoder.
    """

    dtype: str = "bfloat16"
    part: tuple[int, int] = (1, 1)
    batch: int = 32
    of: str | None = None


@dataclass(frozen=True)
class Work:
    """A shard, how many images each of its samples has, and the file their features go to."""

    shard: Shard
    images_of_samples: list[int]
    file: FeatureFile


@dataclass(frozen=True)
class Wanted:
    """Which model's features go where.

    Attributes:
        option: of the run, which names the directory.
        target: the frozen model of an objective; None: the run's encoder.
        tokens, width: of an image's features.
    """

    option: str
    directory: Path
    target: Target | None
    tokens: int
    width: int


def wanted_features(config: RunConfig, of: str | None) -> Wanted:
    """The features that the run asks to be computed.

    Args:
        of: the objective whose frozen model is meant; None: the run's encoder.

    Raises:
        ValueError: the objective has none in this run, or no directory is named.
    """
    tokens = num_visual_tokens(config.model)
    if of is None:
        if config.data.features is None:
            raise ValueError("Name the directory that features are written to: data.features=DIR.")
        directory = Path(config.data.features)
        return Wanted("data.features", directory, None, tokens, config.model.vision.hidden_size)
    targets = {target.objective: target for target in wanted_targets(config).values()}
    if of not in targets:
        raise ValueError(
            f"of={of} is no objective of this run that looks at a frozen vision model: "
            + (f"choose one of {', '.join(targets)}." if targets else "none of its objectives does.")
        )
    target = targets[of]
    if target.features is None:
        raise ValueError(f"Name the directory that features are written to: {target.option('features')}=DIR.")
    from nemo_pre.terms.vision_facts import check_files, vision_facts

    check_files(target)
    return Wanted(target.option("features"), Path(target.features), target, tokens, vision_facts(target).width)
