"""Whether ``data.features`` are those of a run: its encoder, its preprocessing, its shards. Imports torch only to
compare weights."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_pre.config.derived import world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.data.features import CachedFeatures, FeaturesManifest, read_features
from nemo_pre.data.manifest import Shard, read_manifest
from nemo_pre.launch.environment import is_first_rank, prepare_environment


def check_features(config: RunConfig) -> list[str]:
    """Check everything that a run with ``data.features`` reads instead of images; returns warnings.

    Raises:
        ValueError: one sentence on what is missing, cut, or of another run.
    """
    assert config.data.features is not None
    features = read_features(config.data.features)
    check_described(config, features)
    CachedFeatures(features.directory, shards_of(config))
    # Reading a checkpoint imports Megatron, which wants its environment: the one that the ranks will find.
    prepare_environment(config.platform, world_size(config.parallel) // config.cluster.nodes)
    from nemo_pre.features.tower import check_tower_file, check_weights

    check_tower_file(features)
    if is_first_rank():
        check_weights(config, features)
    if features.dtype == "bfloat16" and config.precision.name == "fp32":
        return [f"data.features={features.directory} is rounded to bfloat16, which shows in a float32 run's losses."]
    return []


def check_described(config: RunConfig, features: FeaturesManifest) -> None:
    """
    Raises:
        ValueError: naming the first option that differs.
    """
    for option, value in described(config).items():
        found = features.described.get(option)
        if found != value:
            raise ValueError(
                f"data.features={features.directory} was computed with {option}={found} and this run has {value}: set "
                f"it back, or compute features in a directory of their own."
            )


def described(config: RunConfig) -> dict[str, Any]:
    """What features depend on beside images and weights, by option."""
    vision = {f"model.vision.{name}": value for name, value in asdict(config.model.vision).items()}
    return {
        **vision,
        "data.image_resize": config.data.image_resize,
        "data.image_filter": config.data.image_filter,
    }


def shards_of(config: RunConfig) -> list[Shard]:
    """All that the run reads: what it trains on, and the validation split."""
    sources = [source.path for source in config.data.blend or []] or [config.data.path]
    training = [shard for path in sources for shard in read_manifest(path).shards.get("train", [])]
    return training + read_manifest(config.data.path).shards.get("val", [])
