"""Loading the run's tokenizer: the one the model names, or the one that lies with the data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_pre.config.run import RunConfig
from nemo_pre.data.manifest import read_manifest


def tokenizer_path(config: RunConfig) -> str:
    """Directory or hub id of the tokenizer of a run."""
    if config.model.tokenizer:
        return str(config.model.tokenizer)
    manifest = read_manifest(config.data.path)
    if manifest.tokenizer is None:
        raise ValueError(
            f"no tokenizer lies with {config.data.path}: set model.tokenizer to an HF tokenizer directory"
        )
    return str(manifest.tokenizer)


def load_tokenizer(path: str | Path) -> Any:
    """A ``transformers`` fast tokenizer from a directory or hub id.

    Raises:
        ValueError: it cannot be loaded, or has no eos token.
    """
    # Loader workers are forked after the tokenizer was used; its own threads would not survive that.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), use_fast=True, trust_remote_code=False)
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
