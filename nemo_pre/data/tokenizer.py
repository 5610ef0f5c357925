"""Loading the run's tokenizer: the one the model names, the one that lies with the data, or that of the weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.data.hub import find_hf_file
from nemo_pre.data.manifest import read_manifest

KEPT = "huggingface"  # the folder of an import's checkpoint with the source's files beside its weights


def tokenizer_path(config: RunConfig) -> str:
    """Directory or hub id of the tokenizer of a run: ``model.tokenizer``; else the one that lies with the data; else
    the one that the weights of ``init_from`` came with.

    Raises:
        ValueError: there is none.
    """
    if config.model.tokenizer:
        return str(config.model.tokenizer)
    manifest = read_manifest(config.data.path)
    found = manifest.tokenizer or (_tokenizer_of(config.init_from) if config.init_from else None)
    if found is None:
        also = f" nor in init_from={config.init_from}" if config.init_from else ""
        raise ValueError(
            f"No tokenizer lies with data.path={config.data.path}{also}: set model.tokenizer to an HF tokenizer "
            f"directory."
        )
    return str(found)


def _tokenizer_of(init_from: str) -> str | None:
    """The tokenizer that an import kept beside its weights, wherever it was moved since, or that a former stage's run
    used; None where neither is there."""
    from nemo_pre.run_files.checkpoints import former_stage
    from nemo_pre.run_files.saved_config import read_saved

    checkpoint = Path(former_stage(init_from))
    if (checkpoint / KEPT / "tokenizer_config.json").is_file():
        return str(checkpoint / KEPT)
    saved = read_saved(checkpoint)
    if saved.model.tokenizer is not None:
        return str(saved.model.tokenizer)
    return _tokenizer_of(saved.init_from) if saved.init_from and Path(saved.init_from).is_dir() else None


def load_tokenizer(path: str | Path) -> Any:
    """A ``transformers`` fast tokenizer from a directory or hub id.

    Raises:
        ValueError: it cannot be loaded, or has no eos token.
    """
    # Loader workers are forked after the tokenizer was used; its own threads would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        find_hf_file("tokenizer", str(path), "tokenizer_config.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True)
    except (OSError, ValueError, KeyError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ValueError(f"the tokenizer {path} cannot be loaded: {first_line}") from error
    if tokenizer.eos_token_id is None or not tokenizer.is_fast:
        raise ValueError(f"the tokenizer {path} must be a fast one that has an eos token")
    return tokenizer


def padding_id(tokenizer: Any) -> int:
    """What text is padded with; Llama's tokenizer has no pad token, and padding is never looked at."""
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.eos_token_id)
    return next(int(token) for token in ids if token is not None)
