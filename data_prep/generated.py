"""Building a set whose samples are composed, not read: shards in parallel, what lies beside, and the manifest last.

Every sample draws from a generator of its own, seeded with (seed, split, index), so neither the number of worker
processes nor the order in which they finish shows in the bytes. The manifest is written when all else is there: a
directory without it is an unfinished one.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from data_prep.energon import FOLDER, is_energons, write_metadata
from data_prep.shards import Sample, is_whole, write_shard, write_whole
from nemo_pre.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from nemo_pre.data.progress import Progress
from nemo_pre.orphans import end_with_the_pool

UNFINISHED = "unfinished.json"  # marks a directory that a preparation is filling

Turn = tuple[str, str, str]  # question type, question, answer


class GeneratedSet(ABC):
    """How a set's samples are composed. Worker processes receive it, and the source that they are composed of, once.

    Attributes:
        given: the set's parameters, ``seed`` and ``scenes_per_shard`` among them.
        dataset: its name in the manifest.
        tool_version: raised whenever the bytes for a seed change.
        what: its samples in words, for progress and messages.
        folders: below the set's directory that :meth:`write_beside` and :meth:`write_last` fill.
    """

    given: Any
    dataset: ClassVar[str]
    tool_version: ClassVar[int]
    what: ClassVar[str]
    folders: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """What the bytes depend on, as JSON holds it: a directory made with others is refused."""

    @abstractmethod
    def split_sizes(self) -> dict[str, int]:
        """The number of samples by split, which are drawn for in this order."""

    @abstractmethod
    def sample(
        self, rng: np.random.Generator, source: Any, split: str, key: str
    ) -> tuple[dict[str, bytes], list[str]]:
        """A sample's members by extension, drawn with ``rng``, and the types of its questions."""

    def write_beside(self, out: Path, source: Any) -> None:  # noqa: B027
        """Writes what lies beside the shards and does not depend on them."""

    def write_last(self, out: Path, manifest: dict[str, Any]) -> None:  # noqa: B027
        """Writes what depends on the finished shards."""

    def is_beside(self, out: Path) -> bool:
        """Whether all that :meth:`write_beside` and :meth:`write_last` write is there."""
        return True

    @abstractmethod
    def facts(self, out: Path, source: Any) -> dict[str, Any]:
        """What the manifest states of the set, beside its parameters and splits."""

    def split_facts(self, source: Any, split: str) -> dict[str, Any]:
        """What the manifest states of a split, beside its questions and shards."""
        return {}


@dataclass(frozen=True)
class ShardJob:
    directory: Path
    split: str
    number: int
    indices: range  # of the samples, within the split

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def build(out: Path, made: GeneratedSet, load: Callable[[], Any], workers: int | None) -> dict[str, Any]:
    """Fills ``out`` and returns the manifest. Data that is already complete is left as it is; what is missing or cut
    of it is written again.

    Args:
        load: returns the source of the samples; called when there is something to write.
        workers: processes; None: one per core.

    Raises:
        ValueError: ``workers`` is out of range, or ``out`` holds something else.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    finished = _inspect(out, made)
    jobs = _plan(out, made)
    total = sum(made.split_sizes().values())
    if finished is not None:
        entries = {entry["file"]: entry for content in finished["splits"].values() for entry in content["shards"]}
        jobs = [job for job in jobs if not is_whole(out, entries[f"{job.name}.tar"])]
        if not jobs and made.is_beside(out) and is_energons(out, finished["splits"]):
            say(f"{out} already holds these {total:,} {made.what}; nothing to do")
            return finished
        say(f"{out} is complete but for {len(jobs)} shard(s) and what lies with them; writing those again")

    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / UNFINISHED, json.dumps({"dataset": made.dataset}).encode())
    source = load()
    made.write_beside(out, source)
    written = _run(jobs, made, source, workers)
    manifest = finished or _manifest(out, made, source, written)
    write_metadata(out, manifest["splits"])
    made.write_last(out, manifest)
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    (out / UNFINISHED).unlink()
    say(f"wrote {sum(entry['samples'] for entry in written):,} {made.what} in {len(written)} shards to {out}")
    return manifest


def _inspect(out: Path, made: GeneratedSet) -> dict[str, Any] | None:
    """The manifest when ``out`` was once completed with these parameters, None when it is to be filled."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    if (out / MANIFEST).is_file():
        try:
            manifest = json.loads((out / MANIFEST).read_text())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{out / MANIFEST} is not JSON ({error}); remove {out} or name another out") from error
        ours = {"dataset": made.dataset, "tool_version": made.tool_version, "parameters": made.parameters()}
        theirs = {name: manifest.get(name) for name in ours} if isinstance(manifest, dict) else None
        if theirs != ours:
            raise ValueError(f"out={out} holds other data ({theirs}, asked for {ours}); remove it or name another out")
        return manifest
    if (out / UNFINISHED).is_file():
        say(f"{out} was left unfinished; starting it over")
        for path in [
            file for pattern in ("*.tar", "*.tar.idx", "*.index.json", "*.partial") for file in out.glob(pattern)
        ]:
            path.unlink()
        for folder in (*made.folders, FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} holds something else; name a new or an empty directory")
    return None


def _plan(out: Path, made: GeneratedSet) -> list[ShardJob]:
    size = made.given.scenes_per_shard
    return [
        ShardJob(out, split, number, range(start, min(start + size, total)))
        for split, total in made.split_sizes().items()
        for number, start in enumerate(range(0, total, size))
    ]


def _run(jobs: list[ShardJob], made: GeneratedSet, source: Any, workers: int | None) -> list[dict[str, Any]]:
    progress = Progress(made.what, sum(len(job.indices) for job in jobs))

    def collect(results: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        written = []
        for entry in results:
            progress.advance(entry["samples"])
            written.append(entry)
        return written

    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        return collect(_write(job, made, source) for job in jobs)
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(made, source)
    ) as pool:
        return collect(pool.map(_write_received, jobs))


_received: tuple[GeneratedSet, Any]  # of a worker process: sent once, not with each shard


def _begin(made: GeneratedSet, source: Any) -> None:
    global _received
    end_with_the_pool()
    _received = (made, source)


def _write_received(job: ShardJob) -> dict[str, Any]:
    return _write(job, *_received)


def _write(job: ShardJob, made: GeneratedSet, source: Any) -> dict[str, Any]:
    types: Counter[str] = Counter()

    def samples() -> Iterator[Sample]:
        split = list(made.split_sizes()).index(job.split)
        for index in job.indices:
            key = f"{job.split}-{index:06d}"
            members, kinds = made.sample(
                np.random.default_rng([made.given.seed, split, index]), source, job.split, key
            )
            types.update(kinds)
            yield key, members

    entry = write_shard(job.directory, job.name, samples())
    return {"split": job.split, **entry, "question_types": dict(sorted(types.items()))}


def _manifest(out: Path, made: GeneratedSet, source: Any, written: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    for split in made.split_sizes():
        shards = [{k: v for k, v in entry.items() if k != "split"} for entry in written if entry["split"] == split]
        types: Counter[str] = Counter()
        for shard in shards:
            types.update(shard.pop("question_types"))
        splits[split] = {
            "samples": sum(shard["samples"] for shard in shards),
            **made.split_facts(source, split),
            "questions": dict(sorted(types.items())),
            "shards": shards,
        }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dataset": made.dataset,
        "tool_version": made.tool_version,
        "parameters": made.parameters(),
        **made.facts(out, source),
        "splits": splits,
    }


def composed(key: str, image: np.ndarray | None, mask: np.ndarray | None, turns: list[Turn], **facts: Any) -> dict:
    """A sample's members: the picture, its mask, and the record with the conversation and ``facts`` at its end."""
    record: dict[str, Any] = {"id": key}
    members: dict[str, bytes] = {}
    if image is not None and mask is not None:
        members = {"png": png(image), "mask.png": png(mask)}
        record["image"] = f"{key}.png"
    record["conversations"] = _conversations(turns, with_image=image is not None)
    record["question_types"] = [kind for kind, _, _ in turns]
    return {**members, "json": json.dumps({**record, **facts}, separators=(",", ":")).encode()}


def _conversations(turns: list[Turn], with_image: bool) -> list[dict[str, str]]:
    messages = []
    for number, (_, question, answer) in enumerate(turns):
        tag = "<image>\n" if with_image and number == 0 else ""
        messages.append({"from": "human", "value": tag + question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
