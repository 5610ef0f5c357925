"""The whole directory: the manifest's own sums, then every shard and every sample in parallel processes."""

from __future__ import annotations

import bisect
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from data_prep.energon import EMPTY
from data_prep.validate.content import Chunk, ChunkResult, Limits, check_chunk
from data_prep.validate.duplicates import Place, Questions
from data_prep.validate.findings import Finding, Report
from data_prep.validate.parallel import in_parallel, num_workers
from data_prep.validate.shard import ShardJob, check_shard, read_index
from data_prep.validate.tar import BLOCK
from nemo_pre.data.manifest import MANIFEST, Manifest, Shard, read_manifest
from nemo_pre.data.progress import Progress

SAMPLES_PER_CHUNK = 1024


def check(path: Path, limits: Limits, workers: int | None = None, sample: int | None = None, seed: int = 0) -> Report:
    """All findings, shard by shard. ``sample``: how many samples, drawn with ``seed``, to re-read; None: all.

    Raises:
        ValueError: no manifest, or an argument out of range.
    """
    if sample is not None and sample < 1:
        raise ValueError(f"sample={sample}: give at least 1, or null for every sample")
    start = time.monotonic()
    processes = num_workers(workers)
    manifest = read_manifest(path, "path")
    named = named_shards(manifest)
    split_of_shard = [number for number, split in enumerate(manifest.shards.values()) for _ in split]
    findings = _check_manifest(manifest)
    jobs = plan(manifest, limits, sample, seed)
    progress = Progress("samples re-read", sum(len(job.positions) for job in jobs if isinstance(job, Chunk)))
    questions = Questions(split_of_shard)
    checked = 0
    for result in in_parallel(_check, jobs, processes):
        if isinstance(result, ChunkResult):
            findings += result.findings
            questions.add(result)
            checked += result.checked
            progress.advance(result.asked)
        else:
            findings += result
    if sample is None:
        findings += _duplicates(questions.across_splits(), named)
    order = {name: number for number, (name, _) in enumerate(named)}
    findings.sort(key=lambda finding: (order.get(finding.shard, -1), finding.position, finding.reason))
    splits = {split: manifest.num_samples(split) for split in manifest.shards}
    return Report(path, splits, len(named), checked, sample is not None, time.monotonic() - start, findings)


def _check(job: ShardJob | Chunk) -> list[Finding] | ChunkResult:
    return check_shard(job) if isinstance(job, ShardJob) else check_chunk(job)


def plan(manifest: Manifest, limits: Limits, sample: int | None, seed: int) -> list[ShardJob | Chunk]:
    """Every shard as a whole, and the samples to re-read in chunks."""
    named = named_shards(manifest)
    entries = [entry for split in manifest.raw["splits"].values() for entry in split["shards"]]
    jobs: list[ShardJob | Chunk] = [
        ShardJob(name, shard, entry, checksums=sample is None)
        for (name, shard), entry in zip(named, entries, strict=True)
    ]
    return jobs + [
        Chunk(number, *named[number], positions, limits)
        for number, positions in chunks([shard for _, shard in named], sample, seed)
    ]


def named_shards(manifest: Manifest) -> list[tuple[str, Shard]]:
    """All shards in the manifest's order, by their paths within the directory."""
    shards = [shard for split in manifest.shards.values() for shard in split]
    return [(os.path.relpath(shard.path, manifest.directory), shard) for shard in shards]


def chunks(shards: list[Shard], sample: int | None = None, seed: int = 0) -> Iterator[tuple[int, Sequence[int]]]:
    """(number of a shard, positions in it): all, or ``sample`` of them drawn with ``seed``."""
    sizes = [shard.samples if 0 <= shard.samples <= most_samples(shard) else 0 for shard in shards]
    ends = list(accumulate(sizes))
    drawn: dict[int, Sequence[int]] = dict(enumerate(map(range, sizes)))
    if sample is not None and ends:
        drawn = defaultdict(list)
        for number in sorted(random.Random(seed).sample(range(ends[-1]), min(sample, ends[-1]))):
            of_shard = bisect.bisect_right(ends, number)
            drawn[of_shard] = [*drawn[of_shard], number - ends[of_shard] + sizes[of_shard]]
    for shard_number, positions in drawn.items():
        for start in range(0, len(positions), SAMPLES_PER_CHUNK):
            yield shard_number, positions[start : start + SAMPLES_PER_CHUNK]


def most_samples(shard: Shard) -> int:
    """A sample takes two blocks of the tar at least; a manifest that states more cannot be followed."""
    return os.path.getsize(shard.path) // (2 * BLOCK) if os.path.isfile(shard.path) else 0


def _check_manifest(manifest: Manifest) -> list[Finding]:
    findings = []
    for split, content in manifest.raw["splits"].items():
        stated, summed = content.get("samples"), manifest.num_samples(split)
        if stated != summed:
            detail = f"split {split} states {stated} samples, its shards sum to {summed}"
            findings.append(Finding(MANIFEST, "", "sample_count", detail))
    names = Counter(name for name, _ in named_shards(manifest))
    for name, shard in named_shards(manifest):
        if not 0 <= shard.samples <= most_samples(shard) and os.path.isfile(shard.path):
            detail = f"{shard.samples} samples do not fit into its {os.path.getsize(shard.path)} bytes"
            findings.append(Finding(name, "", "sample_count", detail))
    findings += [Finding(name, "", "shard_twice", f"{count} times") for name, count in names.items() if count > 1]
    if manifest.tokenizer is not None and not os.path.isfile(manifest.tokenizer / "tokenizer.json"):
        findings.append(Finding(MANIFEST, "", "missing_file", f"{manifest.tokenizer / 'tokenizer.json'}"))
    known = {os.path.normpath(file) for _, shard in named_shards(manifest) for file in (shard.path, shard.index_path)}
    known.add(os.path.normpath(manifest.directory / EMPTY))
    for pattern in ("*.tar", "*.index.json", "*.partial"):
        for file in sorted(manifest.directory.rglob(pattern)):
            if os.path.normpath(file) not in known:
                name = os.path.relpath(file, manifest.directory)
                findings.append(Finding(name, "", "stray_file", f"{os.path.getsize(file)} bytes"))
    return findings


def _duplicates(pairs: Iterable[tuple[Place, Place]], named: list[tuple[str, Shard]]) -> Iterator[Finding]:
    """The pairs as findings, one per sample; keys are looked up shard by shard."""
    by_sample = dict(pairs)
    wanted = defaultdict(set)
    for number, position in {*by_sample, *by_sample.values()}:
        wanted[number].add(position)
    keys = {}
    for number, positions in wanted.items():
        index = read_index(named[number][1].index_path)
        keys.update({(number, position): index[position]["key"] for position in positions})
    for here, there in by_sample.items():
        detail = f"asks what {keys[there]} of {named[there[0]][0]} asks"
        yield Finding(named[here[0]][0], keys[here], "duplicate_across_splits", detail, here[1])
