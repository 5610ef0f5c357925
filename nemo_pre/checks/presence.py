"""What must lie on disk, or be within reach, before a run starts: weights, tokenizer, data, a former stage."""

from __future__ import annotations

from pathlib import Path

from nemo_pre.config.run import RunConfig
from nemo_pre.data.hub import find_hf_file
from nemo_pre.data.manifest import read_manifest
from nemo_pre.data.tokenizer import tokenizer_path
from nemo_pre.objectives.registry import enabled
from nemo_pre.run_files.checkpoints import checkpoint_dir, former_stage, numbered_checkpoints
from nemo_pre.run_files.saved_config import check_same_model, check_same_weights, read_saved


def check_presence(config: RunConfig, former: RunConfig | None = None, checkpoint: str | None = None) -> str:
    """Check every file a run starts from; returns one line on the data. Where the tokenizer is that of ``init_from``,
    or the one that the run went on with so far, the configuration names it from now on.

    Args:
        config: the run.
        former: the run, checked already, whose checkpoint ``init_from`` is going to be.
        checkpoint: the run's own, from which it goes on.

    Raises:
        ValueError: one sentence on what is missing or does not fit, and what to do.
    """
    from nemo_pre.checks.data import check_data
    from nemo_pre.data.tokenizer import SETTINGS, tokenizer_problem

    if checkpoint is not None and not config.model.tokenizer:
        config.model.tokenizer = _tokenizer_of_run(checkpoint, config.data.path)
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
    if former is not None:
        check_same_model(config.model, former.model, f"{former.name}, the stage before it,")
    else:
        check_init_from(config)
        if not named and manifest.tokenizer is not None:
            _check_words_of_weights(config, manifest.tokenizer)
        check_encoder_start(config)
    if not named and manifest.tokenizer is None:
        # so that the run's checkpoints say which it was
        config.model.tokenizer = (former and former.model.tokenizer) or tokenizer_path(config)
        _check_tokenizer_of_weights(config)
    sizes = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in sorted(manifest.shards))
    return f"{config.data.path} ({manifest.dataset}: {sizes} samples)"


def check_init_from(config: RunConfig) -> None:
    """Check that the weights a run starts from are there and of its model, by the checkpoint's ``config.yaml`` alone.
    A run that has checkpoints of its own continues from those, wherever the former stage's are now.

    Raises:
        ValueError: one sentence on what is missing or differs.
    """
    if config.init_from is None or _continues(config):
        return
    if not Path(config.init_from).expanduser().is_dir():
        raise ValueError(
            f"init_from={config.init_from} is not a directory: train the former stage, or import weights, first."
        )
    check_same_weights(config.model, former_stage(config.init_from))


def _continues(config: RunConfig) -> bool:
    return config.resume and bool(numbered_checkpoints(checkpoint_dir(config)))


def _tokenizer_of_run(checkpoint: str, data: str) -> str | None:
    """The tokenizer that a run's own checkpoint names, with whose words it goes on wherever the former stage is now;
    None where it names none. One that is gone is looked for anew, unless that would find another one with the data.
    """
    named = read_saved(checkpoint).model.tokenizer
    if not named or not (Path(named).expanduser().is_dir() or read_manifest(data).tokenizer):
        return None
    return str(named)


def _check_words_of_weights(config: RunConfig, with_data: str | Path) -> None:
    """Refuse a tokenizer that lies with the data and whose ids mean other words to the weights of ``init_from``."""
    from nemo_pre.data.tokenizer import conflicting_words, tokenizer_of_weights, tokenizer_problem

    if config.init_from is None or _continues(config):
        return
    theirs = tokenizer_of_weights(config.init_from)
    if theirs is None or not Path(theirs).expanduser().is_dir() or tokenizer_problem(theirs) is not None:
        return
    found = conflicting_words(with_data, theirs)
    if found is not None:
        id, word, known = found
        raise ValueError(
            f"The tokenizer that lies with data.path={config.data.path} is not that of the weights of "
            f"init_from={config.init_from}: token {id} is {word!r} there, {known!r} to the weights; set "
            f"model.tokenizer={theirs}."
        )


def check_encoder_start(config: RunConfig) -> None:
    """Check that the tower that a run's encoder starts as is there and is the run's. A run that has weights already,
    of its own or of ``init_from``, reads none.

    Raises:
        ValueError: one sentence on what is missing or differs.
    """
    if config.vision_from is None or config.init_from is not None or _continues(config):
        return
    from nemo_pre.huggingface.start_tower import check_vision_from

    check_vision_from(config)


def _check_tokenizer_of_weights(config: RunConfig) -> None:
    """Refuse a tokenizer that the weights of ``init_from`` came with and that is not where it was."""
    from nemo_pre.data.tokenizer import SETTINGS, tokenizer_problem

    found = str(config.model.tokenizer)
    problem = tokenizer_problem(found)
    if problem is not None:
        raise ValueError(
            f"The tokenizer {found}, which the weights of init_from={config.init_from} came with, cannot be loaded: "
            f"{problem}; or set model.tokenizer."
        )
    find_hf_file("model.tokenizer", found, SETTINGS)
