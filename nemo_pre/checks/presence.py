"""What must lie on disk, or be within reach, before a run starts: weights, tokenizer, data, a former stage."""

from __future__ import annotations

from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.data.hub import find_hf_file
from nemo_pre.data.tokenizer import tokenizer_path
from nemo_pre.objectives.registry import enabled


def check_presence(config: RunConfig) -> str:
    """Check every file a run starts from; returns one line on the data. Where the tokenizer is that of ``init_from``,
    the configuration names it from now on.

    Raises:
        ValueError: one sentence on what is missing or does not fit, and what to do.
    """
    from nemo_pre.checks.data import check_data
    from nemo_pre.data.tokenizer import SETTINGS, tokenizer_problem

    named = config.model.tokenizer
    manifest = check_data(config.data.path, None if named else config.model.language.vocab_size)
    if named:
        problem = tokenizer_problem(named)
        if problem is not None:
            raise ValueError(f"model.tokenizer={named} cannot be loaded: {problem}.")
        find_hf_file("model.tokenizer", named, SETTINGS)
    for objective in enabled(config):
        for option, source, name in objective.files():
            find_hf_file(option, source, name)
    if config.init_from and not Path(config.init_from).expanduser().is_dir():
        raise ValueError(
            f"init_from={config.init_from} is not a directory: train the former stage, or import weights, first."
        )
    if not named and manifest.tokenizer is None:
        config.model.tokenizer = tokenizer_path(config)  # so that the run's checkpoints say which it was
    sizes = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in sorted(manifest.shards))
    return f"{config.data.path} ({manifest.dataset}: {sizes} samples)"
