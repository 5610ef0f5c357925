"""One pass over all samples: exact counts of every length, size and number."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.validate.check import chunks, named_shards
from data_prep.validate.content import IMAGE_TAG, load_tokenizer
from data_prep.validate.members import images_of
from data_prep.validate.parallel import in_parallel, num_workers
from data_prep.validate.shard import read_index
from nemo_pre.data.decoding import header_size
from nemo_pre.data.errors import SampleError
from nemo_pre.data.manifest import Manifest, Shard, read_manifest
from nemo_pre.data.progress import Progress
from nemo_pre.data.shards import ShardedSamples

ORIGIN = re.compile(r"(?P<name>.+?):(?P<file>.+)\[\d+\]")  # of a prepared record: NAME:FILE[ROW]
TEXT_ONLY = "text only"


@dataclass
class Counts:
    """How many samples (of ``sizes``: images) have which value; ``unreadable`` samples are in no other count."""

    samples: int = 0
    unreadable: int = 0
    sources: Counter[str] = field(default_factory=Counter)
    characters: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    decoder_tokens: Counter[int] = field(default_factory=Counter)
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)  # (width, height)

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class Counted:
    manifest: Manifest
    tokenizer: str | None
    visual_tokens: int
    splits: dict[str, Counts]


@dataclass(frozen=True)
class Job:
    split: str
    shard: Shard
    positions: Any
    tokenizer: str | None
    visual_tokens: int
    dataset: str


def count(path: Path, tokenizer: str | None, visual_tokens: int, processes: int | None = None) -> Counted:
    """Raises ValueError if the manifest, an index or the tokenizer cannot be read."""
    manifest = read_manifest(path, "path")
    if tokenizer is None and manifest.tokenizer is not None:
        tokenizer = str(manifest.tokenizer)
    if tokenizer is not None:
        load_tokenizer(tokenizer)
    splits = [split for split, shards in manifest.shards.items() for _ in shards]
    shards = [shard for _, shard in named_shards(manifest)]
    jobs = [
        Job(splits[number], shards[number], positions, tokenizer, visual_tokens, manifest.dataset)
        for number, positions in chunks(shards)
    ]
    counted = Counted(manifest, tokenizer, visual_tokens, {split: Counts() for split in manifest.shards})
    progress = Progress("samples counted", sum(len(job.positions) for job in jobs))
    for split, counts in in_parallel(_count, jobs, num_workers(processes)):
        counted.splits[split].add(counts)
        progress.advance(counts.samples)
    return counted


def _count(job: Job) -> tuple[str, Counts]:
    counts = Counts()
    index, samples = read_index(job.shard.index_path), ShardedSamples([job.shard])
    for position in job.positions:
        counts.samples += 1
        try:
            _count_sample(counts, samples, position, index[position], job)
        except (SampleError, ValueError):
            counts.unreadable += 1
    return job.split, counts


def _count_sample(counts: Counts, samples: ShardedSamples, position: int, entry: dict[str, Any], job: Job) -> None:
    record = samples.read(position).record
    texts = [message["value"].replace(IMAGE_TAG, "") for message in _messages(record)]
    names = images_of(entry["members"])
    sizes = [header_size(samples.read_member(position, name)) for name in names]
    if job.tokenizer is not None:
        tokens = _num_tokens(texts, job.tokenizer)
        counts.tokens[tokens] += 1
        counts.decoder_tokens[tokens + len(names) * job.visual_tokens] += 1
    counts.sources[_source(record, entry, job.dataset)] += 1
    counts.characters[sum(map(len, texts))] += 1
    counts.turns[(len(texts) + 1) // 2] += 1
    counts.images[len(names)] += 1
    counts.sizes.update(sizes)


def _messages(record: dict[str, Any]) -> list[dict[str, str]]:
    messages = record["conversations"]
    if not all(isinstance(message, dict) and isinstance(message.get("value"), str) for message in messages):
        raise ValueError("a message without text")
    return messages


def _num_tokens(texts: Iterable[str], directory: str) -> int:
    tokenizer, _ = load_tokenizer(directory)
    try:
        return sum(len(tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
    except TypeError as error:  # half of a surrogate pair, which no UTF-8 has
        raise ValueError(str(error)) from error


def _source(record: dict[str, Any], entry: dict[str, Any], dataset: str) -> str:
    """What the record or its index entry says, without file and row; with the folder its rows or images come from,
    as in LLaVA's mixture."""
    stated = record.get("source") or entry.get("source")
    origin = ORIGIN.fullmatch(str(stated))
    if stated is not None and origin is None:
        return str(stated)
    name = origin["name"] if origin else dataset
    if origin and (folder := os.path.dirname(origin["file"])):
        return f"{name}/{folder}"
    image = record.get("images") or record.get("image")
    image = image[0] if isinstance(image, list) and image else image
    if not isinstance(image, str):
        return f"{name}/{TEXT_ONLY}" if origin else TEXT_ONLY
    folder, slash, _ = os.path.normpath(image).partition("/")
    folder = folder if slash else ""
    return "/".join(filter(None, (name, folder))) if origin else folder or name or "unnamed"
