"""Whether features on disk are those of a run: its encoder or its objective's model, its preprocessing, its shards.
Imports torch only for weights and frozen models."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from nemo_pre.config.derived import num_visual_tokens, world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.data.decoding import DECODING
from nemo_pre.data.features import CachedFeatures, FeaturesManifest, read_features
from nemo_pre.data.manifest import Shard, read_manifest
from nemo_pre.launch.environment import is_first_rank, prepare_environment
from nemo_pre.objectives.target import Target

PICTURES = "the way in which pictures are decoded"


def check_features(config: RunConfig) -> list[str]:
    """Check everything that a run with ``data.features`` reads instead of images; returns warnings.

    Raises:
        ValueError: one sentence on what is missing, cut, or of another run.
    """
    assert config.data.features is not None
    features = read_features(config.data.features)
    check_described(described(config), features)
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


def check_target_features(config: RunConfig, target: Target) -> list[str]:
    """Check everything that a run reads instead of running an objective's frozen model; returns warnings.

    Where the run names the model too, its weights are compared; otherwise the features are taken as they are.

    Raises:
        ValueError: one sentence on what is missing, cut, or of another model, preprocessing or data.
    """
    assert target.features is not None
    option = target.option("features")
    features = read_features(target.features, option)
    prepare_environment(config.platform, world_size(config.parallel) // config.cluster.nodes)
    check_described(target_described(config, target), features)
    CachedFeatures(features.directory, training_shards(config), option)
    if target.path is not None and is_first_rank():
        from nemo_pre.features.tower import check_target_weights

        check_target_weights(target, features)
    if features.dtype == "bfloat16" and config.precision.name == "fp32":
        return [f"{option}={features.directory} is rounded to bfloat16, which shows in a float32 run's losses."]
    return []


def check_described(wanted: dict[str, Any], features: FeaturesManifest) -> None:
    """Compare what the features were computed with and what the run wants.

    Raises:
        ValueError: naming the first option that differs.
    """
    for option, value in wanted.items():
        found = features.described.get(option)
        if option == PICTURES and found != value:
            raise ValueError(
                f"{features.option}={features.directory} is of pictures decoded in way {found or 1}, and this version "
                f"decodes them in way {value} (docs/data.md says what changed): compute features in a directory of "
                f"their own."
            )
        if found != value:
            raise ValueError(
                f"{features.option}={features.directory} was computed with {option}={found} and this run has {value}: "
                f"set it back, or compute features in a directory of their own."
            )


def described(config: RunConfig) -> dict[str, Any]:
    """What features depend on beside images and weights, by option."""
    vision = {f"model.vision.{name}": value for name, value in asdict(config.model.vision).items()}
    return {
        PICTURES: DECODING,
        **vision,
        "data.image_resize": config.data.image_resize,
        "data.image_filter": config.data.image_filter,
        "data.image_crop_from": config.data.image_crop_from,
    }


def target_described(config: RunConfig, target: Target) -> dict[str, Any]:
    """What the features of an objective's model depend on beside its weights: the picture that the run makes of an
    image, what the model is shown of it, and the grid of visual tokens. Without the model, what the run says alone."""
    found: dict[str, Any] = {
        PICTURES: DECODING,
        "model.vision.image_size": config.model.vision.image_size,
        "data.image_resize": config.data.image_resize,
        "data.image_filter": config.data.image_filter,
        "data.image_crop_from": config.data.image_crop_from,
        "visual tokens of an image": num_visual_tokens(config.model),
        target.option("filter"): target.image_filter,
    }
    if target.path is not None:
        from nemo_pre.terms.vision_facts import config_digest, read_statistics, vision_facts

        statistics = read_statistics(target)
        found[target.option("image_size")] = vision_facts(target).image_size
        found["its pixels' mean, standard deviation and scale"] = [
            list(statistics.mean),
            list(statistics.std),
            statistics.scale,
        ]
        found["the sha256 of its configuration"] = config_digest(target)
    elif target.image_size is not None:
        found[target.option("image_size")] = target.image_size
    return found


def training_shards(config: RunConfig) -> list[Shard]:
    """All that the run trains on."""
    sources = [source.path for source in config.data.blend or []] or [config.data.path]
    return [shard for path in sources for shard in read_manifest(path).shards.get("train", [])]


def shards_of(config: RunConfig) -> list[Shard]:
    """All that the run reads: what it trains on, and the validation split."""
    return training_shards(config) + read_manifest(config.data.path).shards.get("val", [])
