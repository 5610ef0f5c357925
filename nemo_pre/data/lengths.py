"""How many tokens every training sample has, measured once: what packing is planned from.

The lengths lie with the data, in ``lengths/KEY.npy``; the key is made of all they depend on: the samples, the
tokenizer, the template, the longest sequence, and the visual tokens of an image. Of images at most the header is
read, where their number of visual tokens follows from their size.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import repeat
from math import prod
from pathlib import Path

import numpy as np

from nemo_pre.data.conversation import encode, num_image_tags
from nemo_pre.data.dataset import Preprocessing
from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import Manifest
from nemo_pre.data.shards import ShardedSamples
from nemo_pre.orphans import end_with_the_pool

UNREADABLE = 0  # a sample that will be passed over, or end the run, when it is read
CHUNK = 1000  # samples a process measures at a time


def read_lengths(manifest: Manifest, how: Preprocessing) -> np.ndarray:
    """int32 ``[samples]`` of the training split, :data:`UNREADABLE` where a sample has none.

    Raises:
        ValueError: they were not measured for this tokenizer, template and sequence length.
    """
    path = lengths_file(manifest, how)
    if not path.is_file():
        raise ValueError(
            f"data.packing needs the lengths of {manifest.directory}'s samples: measure them once with "
            f"nemo-pre data lengths and the options of this run."
        )
    lengths = np.load(path)
    if lengths.shape != (manifest.num_samples("train"),):
        raise ValueError(f"{path} has {len(lengths)} lengths for {manifest.num_samples('train')} samples: remove it.")
    return lengths


def measure_lengths(manifest: Manifest, how: Preprocessing, workers: int | None = None) -> Path:
    """Tokenize every training sample and write the file, unless it is there."""
    path = lengths_file(manifest, how)
    if path.is_file():
        return path
    from nemo_pre.data.progress import Progress

    total = manifest.num_samples("train")
    progress = Progress(f"lengths of {manifest.directory}", total)
    parts = []
    count = min(workers or os.cpu_count() or 1, -(-total // CHUNK))
    with multiprocessing.get_context("fork").Pool(count, end_with_the_pool) as pool:
        starts = range(0, total, CHUNK)
        for part in pool.imap(partial(_measure, manifest, how), zip(starts, repeat(CHUNK), strict=False)):
            parts.append(part)
            progress.advance(len(part))
    path.parent.mkdir(exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    with unfinished.open("wb") as file:
        np.save(file, np.concatenate(parts))
    os.replace(unfinished, path)
    return path


def lengths_file(manifest: Manifest, how: Preprocessing) -> Path:
    tokenizer = hashlib.sha256(how.tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    key = json.dumps(
        [manifest.fingerprint, tokenizer, how.chat_template, how.sequence_length, how.tile_tokens, *_native(how)],
        sort_keys=True,
    )
    return manifest.directory / "lengths" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"


def _native(how: Preprocessing) -> list[int]:
    return [] if how.native is None else [how.native.side, how.native.least, how.native.most]


def sample_length(record: dict[str, object], how: Preprocessing, where: str, images: Sequence[bytes] = ()) -> int:
    """Tokens of a sample with its images expanded, cut as in training.

    Args:
        images: encoded, which only native resolution looks at.

    Raises:
        SampleError: it cannot be encoded.
    """
    conversation = record["conversations"]
    assert isinstance(conversation, list)
    count = sum(map(num_image_tags, conversation[::2]))
    if how.native is None:
        visual = count * how.tile_tokens
    else:
        visual = sum(prod(how.native.grid_of(image, where)) for image in images)
    if visual + 2 > how.sequence_length:
        raise SampleError(f"{where} has {count} images, which leave no room for text")
    room = min(how.max_text_tokens, how.sequence_length - visual + count)
    tokens = encode(conversation, how.tokenizer, how.chat_template, room, count, where).tokens
    return len(tokens) + visual - count


def _measure(manifest: Manifest, how: Preprocessing, part: tuple[int, int]) -> np.ndarray:
    start, count = part
    return np.fromiter(_lengths(ShardedSamples(manifest.shards["train"]), how, start, count), dtype=np.int32)


def _lengths(samples: ShardedSamples, how: Preprocessing, start: int, count: int) -> Iterator[int]:
    for position in range(start, min(start + count, len(samples))):
        try:
            where = f"sample {position} of {samples.shards[0].path.parent}"
            if how.native is None:
                yield sample_length(json.loads(samples.read_member(position, "json")), how, where)
            else:
                raw = samples.read(position)
                yield sample_length(raw.record, how, where, raw.images)
        except (SampleError, ValueError, KeyError, TypeError, AttributeError, AssertionError):
            yield UNREADABLE
