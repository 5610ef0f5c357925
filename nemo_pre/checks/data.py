"""What can be decided about prepared data before a run. Nothing heavy is imported here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nemo_pre.data.manifest import Manifest, read_manifest, verify_shards
from nemo_pre.data.shards import ShardedSamples


def check_data(path: str | Path, vocab_size: int | None = None, splits: Sequence[str] = ("train", "val")) -> Manifest:
    """Presence and schema of prepared data, in milliseconds and without torch: what a dry run asks.

    Every shard of ``splits`` must be there in its size, the first sample must parse, and the
    tokenizer that lies with the data (if one does) must fit into ``vocab_size``.

    Raises:
        ValueError: one sentence on what is wrong and what to do.
    """
    manifest = read_manifest(path)
    for split in splits:
        if not manifest.shards.get(split):
            raise ValueError(f"{manifest.directory} has no {split} shards: prepare the data again")
        verify_shards(manifest.shards[split])
    ShardedSamples(manifest.shards[splits[0]][:1]).read(0)
    if manifest.tokenizer is not None:
        _check_tokenizer(manifest.tokenizer, vocab_size)
    return manifest


def _check_tokenizer(directory: Path, vocab_size: int | None) -> None:
    file = directory / "tokenizer.json"
    try:
        content = json.loads(file.read_text())
        size = 1 + max([*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"])])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not a readable tokenizer ({error!r}): prepare the data again") from error
    if vocab_size is not None and size > vocab_size:
        raise ValueError(
            f"{file} has {size} tokens: set model.language.vocab_size to {size} or more, not {vocab_size}"
        )
