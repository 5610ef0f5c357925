"""Frozen vision models that a run compares with: rehearsed from their configuration, which need not be here."""

from __future__ import annotations

import json
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import enabled

# What is published at the hub ids that recipes name; weights are not needed.
PUBLISHED: dict[str, dict[str, Any]] = {
    "facebook/dinov2-base": {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "patch_size": 14,
        "image_size": 518,
    }
}
PROCESSOR = {
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def with_stand_ins(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """The run with the models that it names by a known hub id from their published sizes; one sentence on each.

    Raises:
        ValueError: a model is neither a directory here nor known.
    """
    config, told = deepcopy(config), []
    for objective in enabled(config):
        target = objective.target()
        if target is None or target.features is not None or target.path is None:
            continue
        if Path(target.path).expanduser().is_dir():
            continue
        if target.path not in PUBLISHED:
            raise ValueError(
                f"{target.option('path')}={target.path} is not a directory here, and its sizes are not known: name a "
                f"directory that has its config.json and preprocessor_config.json."
            )
        directory = Path(tempfile.mkdtemp(prefix="rehearsed-"))
        (directory / "config.json").write_text(json.dumps(PUBLISHED[target.path]))
        (directory / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
        setattr(objective.options, target.option("path").rpartition(".")[2], str(directory))
        told.append(f"the weights and the files of {target.path}, rehearsed from its published sizes")
    return config, told
