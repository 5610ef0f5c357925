"""The weights of the vision tower that a run starts with and of objectives' models, and how two of them are told
apart."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

from nemo_pre.config.run import RunConfig
from nemo_pre.data.features import MANIFEST, TOWER, FeaturesManifest
from nemo_pre.huggingface.weights import TOWER as PREFIX
from nemo_pre.launch.silence import silence
from nemo_pre.objectives.target import Target
from nemo_pre.run_files.checkpoints import start_checkpoint
from nemo_pre.run_files.saved_config import check_same_weights
from nemo_pre.terms.frozen_vision import NOT_USED, load_model


def tower_weights(config: RunConfig) -> tuple[dict[str, Tensor], str]:
    """The encoder's weights by name within the tower, and where they are from: the checkpoint that the run continues
    or starts from, ``vision_from``, or its seed.

    Raises:
        ValueError: the checkpoint lacks a weight, or is of another model.
    """
    source = start_checkpoint(config, _damage_of_tower)
    if source is None:
        from nemo_pre.huggingface.start_tower import tower_directory
        from nemo_pre.neva.vision import VisionTowerConfig

        named = config.vision_from
        start = None if named is None else str(tower_directory(named))
        tower = VisionTowerConfig(config.model.vision, config.seed, start=start).configure_model()
        return dict(tower.state_dict()), f"random weights of seed {config.seed}" if named is None else str(named)
    from nemo_pre.huggingface.distributed_checkpoint import CheckpointReader

    check_same_weights(config.model, source)
    with silence():  # its metadata imports Megatron
        reader = CheckpointReader(source)
    reader.check(config.model)
    names = sorted(name for name in reader.tensors() if name.startswith(PREFIX))
    return {name.removeprefix(PREFIX): reader.read(name) for name in names}, source


def _damage_of_tower(checkpoint: Path) -> str:
    with silence():  # its metadata import Megatron
        from nemo_pre.checkpoint_files.inspection import damage_or_danger

        return damage_or_danger(checkpoint, lambda key: key.startswith(PREFIX), alone=True)


def target_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights, on the CPU and by name, that a frozen vision model's patch features depend on."""
    state = model.state_dict()
    return {name: tensor.cpu() for name, tensor in state.items() if not set(name.split(".")) & set(NOT_USED)}


def digest(weights: dict[str, Tensor], dtype: torch.dtype) -> str:
    """sha256 of the weights in ``dtype``, by name."""
    found = hashlib.sha256()
    for name in sorted(weights):
        values = weights[name].to(dtype).contiguous()
        found.update(f"{name} {list(values.shape)}\n".encode())
        found.update(values.flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def digests(weights: dict[str, Tensor]) -> dict[str, str]:
    return {str(dtype).removeprefix("torch."): digest(weights, dtype) for dtype in (torch.float32, torch.bfloat16)}


def check_weights(config: RunConfig, features: FeaturesManifest) -> None:
    """Compare the run's tower with the one whose features they are; a checkpoint of a bf16 run, which holds rounded
    weights, with the rounded.

    Raises:
        ValueError: they differ.
    """
    weights, source = tower_weights(config)
    rounded = all(tensor.dtype == torch.bfloat16 for tensor in weights.values())
    dtype = torch.bfloat16 if rounded else torch.float32
    if digest(weights, dtype) != features.tower[str(dtype).removeprefix("torch.")]:
        raise ValueError(
            f"data.features={features.directory} was computed with another vision tower ({features.tower['source']}) "
            f"than this run starts with ({source}): compute features with the options of this run in a directory of "
            f"their own."
        )


def check_target_weights(target: Target, features: FeaturesManifest) -> None:
    """Compare the objective's model with the one whose features they are.

    Raises:
        ValueError: they differ.
    """
    if digest(target_weights(load_model(target)), torch.float32) != features.tower["float32"]:
        raise ValueError(
            f"{features.option}={features.directory} was computed with other weights ({features.tower['source']}) "
            f"than {target.option('path')}={target.path}: compute features of it in a directory of their own."
        )


def check_tower_file(features: FeaturesManifest) -> Path:
    """The file with the tower's weights, which checkpoints of the run take them from.

    Raises:
        ValueError: it is missing or cut.
    """
    path = features.directory / TOWER
    size = path.stat().st_size if path.is_file() else 0
    if size != features.tower["bytes"]:
        raise ValueError(
            f"{path} has {size} bytes where {MANIFEST} says {features.tower['bytes']}: compute the features again."
        )
    return path
