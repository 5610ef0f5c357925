"""What must lie on disk, or be within reach, before a run starts: weights, tokenizer, data, a former stage."""

from __future__ import annotations

import os
from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import enabled


def check_presence(config: RunConfig) -> str:
    """Check every file a run starts from; returns one line on the data.

    Raises:
        ValueError: one sentence on what is missing or does not fit, and what to do.
    """
    from nemo_pre.checks.data import check_data
    from nemo_pre.data.tokenizer import SETTINGS, tokenizer_problem

    model = config.model
    manifest = check_data(config.data.path, None if model.tokenizer else model.language.vocab_size)
    if model.tokenizer:
        problem = tokenizer_problem(model.tokenizer)
        if problem is not None:
            raise ValueError(f"model.tokenizer={model.tokenizer} cannot be loaded: {problem}.")
        find_hf_file("model.tokenizer", model.tokenizer, SETTINGS)
    elif manifest.tokenizer is None:
        raise ValueError(
            f"No tokenizer lies with data.path={config.data.path}: set model.tokenizer to an HF tokenizer directory."
        )
    for objective in enabled(config):
        for option, source, name in objective.files():
            find_hf_file(option, source, name)
    if config.init_from and not Path(config.init_from).expanduser().is_dir():
        raise ValueError(
            f"init_from={config.init_from} is not a directory: train the former stage, or import weights, first."
        )
    sizes = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in sorted(manifest.shards))
    return f"{config.data.path} ({manifest.dataset}: {sizes} samples)"


def find_hf_file(option: str, source: str, name: str) -> Path:
    """The file ``name`` of a local directory, or of a hub repository that is cached or within reach.

    Raises:
        ValueError: ``source`` is neither.
    """
    directory = Path(source).expanduser()
    if directory.is_dir():
        if not (directory / name).is_file():
            raise ValueError(
                f"{option}={source} is a directory without {name}: name a transformers model's directory."
            )
        return directory / name
    if source.startswith(("/", ".", "~")) or source.count("/") != 1:
        raise ValueError(f"{option}={source} does not exist: name a transformers model's directory, or a hub id.")
    return _hub_file(option, source, name)


def _hub_file(option: str, source: str, name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    cached = try_to_load_from_cache(source, name)
    if isinstance(cached, str):
        return Path(cached)
    reason = "HF_HUB_OFFLINE is set"
    if not HF_HUB_OFFLINE and not os.environ.get("TRANSFORMERS_OFFLINE"):
        try:
            return Path(hf_hub_download(source, name, etag_timeout=10))
        except Exception as error:  # every transport has its own; the reason is told
            reason = f"the hub answers: {type(error).__name__}"
    raise ValueError(
        f"{option}={source} is neither a local directory nor in the hub's cache, and cannot be fetched ({reason}): "
        f"download it elsewhere and name its directory."
    )
