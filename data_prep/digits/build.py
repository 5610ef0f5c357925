"""Builds the digits dataset: shards in parallel, one tokenizer, and the manifest last.

Every scene draws from a generator seeded with (seed, split, index), so neither the number of worker processes
nor the order in which they finish shows in the bytes. The manifest is written when all else is there: a
directory without it is an unfinished one.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_prep.digits.questions import corpus, draw_sample
from data_prep.digits.scans import Scans, load_scans
from data_prep.digits.scene import CANVAS, Scene, render
from data_prep.digits.tokenizer import write_tokenizer
from data_prep.energon import FOLDER, is_energons, write_metadata
from data_prep.shards import Sample, is_whole, write_shard, write_whole
from nemo_pre.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST
from nemo_pre.data.progress import Progress
from nemo_pre.orphans import end_with_the_pool
from nemo_pre.whole_numbers import part_nearest

DATASET = "digits"
TOOL_VERSION = 1  # raise it whenever the bytes for a seed change
UNFINISHED = "unfinished.json"  # marks a directory that this tool is filling
SPLITS = ("train", "val")


@dataclass(frozen=True)
class Parameters:
    """What the bytes depend on."""

    num_scenes: int
    seed: int
    val_fraction: float
    scenes_per_shard: int

    def __post_init__(self) -> None:
        if self.num_scenes < 2:
            raise ValueError(f"num_scenes={self.num_scenes}: give at least 2, one to train on and one to validate")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give a seed of 0 or more")
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction={self.val_fraction}: give a fraction between 0 and 1")
        if self.scenes_per_shard < 1:
            raise ValueError(f"scenes_per_shard={self.scenes_per_shard}: give at least 1")

    def split_sizes(self) -> dict[str, int]:
        num_val = min(max(part_nearest(self.val_fraction, self.num_scenes), 1), self.num_scenes - 1)
        return {"train": self.num_scenes - num_val, "val": num_val}


@dataclass(frozen=True)
class ShardJob:
    directory: Path
    seed: int
    split: str
    number: int
    indices: range  # of the scenes, within the split

    @property
    def name(self) -> str:
        return f"{self.split}-{self.number:05d}"


def build(out: Path, parameters: Parameters, workers: int | None) -> dict[str, Any]:
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers}: give at least 1")
    finished = _inspect(out, parameters)
    jobs = _plan(out, parameters)
    if finished is not None:
        entries = {entry["file"]: entry for split in SPLITS for entry in finished["splits"][split]["shards"]}
        jobs = [job for job in jobs if not is_whole(out, entries[f"{job.name}.tar"])]
        beside = (out / "tokenizer" / "tokenizer.json").is_file() and is_energons(out, finished["splits"])
        if not jobs and beside:
            _say(f"{out} already holds these {parameters.num_scenes:,} scenes; nothing to do")
            return finished
        _say(f"{out} is complete but for {len(jobs)} shard(s) and what lies with them; writing those again")

    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / UNFINISHED, json.dumps({"dataset": DATASET}).encode())
    scans = load_scans(parameters.seed)
    vocabulary = write_tokenizer(out / "tokenizer", corpus())
    written = _run(jobs, scans, workers)
    manifest = finished or _manifest(parameters, scans, vocabulary, written)
    write_metadata(out, manifest["splits"])
    write_whole(out / MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
    (out / UNFINISHED).unlink()
    _say(f"wrote {parameters.num_scenes:,} scenes in {len(written)} shards and a {vocabulary}-word tokenizer to {out}")
    return manifest


def _inspect(out: Path, parameters: Parameters) -> dict[str, Any] | None:
    """The manifest when ``out`` was once completed with these parameters, None when it is to be filled."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={out} is a file; name a directory")
    if (out / MANIFEST).is_file():
        try:
            manifest = json.loads((out / MANIFEST).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{out / MANIFEST} is not JSON ({error}); remove {out} or name another out") from error
        ours = {"dataset": DATASET, "tool_version": TOOL_VERSION, "parameters": asdict(parameters)}
        theirs = {name: manifest.get(name) for name in ours} if isinstance(manifest, dict) else None
        if theirs != ours:
            raise ValueError(f"out={out} holds other data ({theirs}, asked for {ours}); remove it or name another out")
        return manifest
    if (out / UNFINISHED).is_file():
        _say(f"{out} was left unfinished; starting it over")
        for path in [
            file for pattern in ("*.tar", "*.tar.idx", "*.index.json", "*.partial") for file in out.glob(pattern)
        ]:
            path.unlink()
        for folder in ("tokenizer", FOLDER):
            shutil.rmtree(out / folder, ignore_errors=True)
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"out={out} holds something else; name a new or an empty directory")
    return None


def _plan(out: Path, parameters: Parameters) -> list[ShardJob]:
    size = parameters.scenes_per_shard
    return [
        ShardJob(out, parameters.seed, split, number, range(start, min(start + size, total)))
        for split, total in parameters.split_sizes().items()
        for number, start in enumerate(range(0, total, size))
    ]


def _run(jobs: list[ShardJob], scans: Scans, workers: int | None) -> list[dict[str, Any]]:
    progress = Progress("digit scenes", sum(len(job.indices) for job in jobs))

    def collect(results: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        written = []
        for entry in results:
            progress.advance(entry["samples"])
            written.append(entry)
        return written

    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        _receive_scans(scans)
        return collect(map(_write, jobs))
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(scans,)
    ) as pool:
        return collect(pool.map(_write, jobs))


_scans: Scans  # of a worker process: sent once, not with each shard


def _receive_scans(scans: Scans) -> None:
    global _scans
    _scans = scans


def _begin(scans: Scans) -> None:
    end_with_the_pool()
    _receive_scans(scans)


def _write(job: ShardJob) -> dict[str, Any]:
    types: Counter[str] = Counter()
    entry = write_shard(job.directory, job.name, _samples(job, types.update))
    return {"split": job.split, **entry, "question_types": dict(sorted(types.items()))}


def _samples(job: ShardJob, count_types: Callable[[list[str]], None]) -> Iterator[Sample]:
    for index in job.indices:
        rng = np.random.default_rng([job.seed, SPLITS.index(job.split), index])
        scene, turns = draw_sample(rng, _scans, job.split)
        key = f"{job.split}-{index:06d}"
        types = [kind for kind, _, _ in turns]
        count_types(types)
        members: dict[str, bytes] = {}
        record: dict[str, Any] = {"id": key}
        if scene is not None:
            image, mask = render(rng, scene)
            members = {"png": _png(image), "mask.png": _png(mask)}
            record["image"] = f"{key}.png"
        record["conversations"] = _conversations(turns, with_image=scene is not None)
        record["question_types"] = types
        if scene is not None:
            record["scene"] = _describe(scene)
        yield key, {**members, "json": json.dumps(record, separators=(",", ":")).encode()}


def _conversations(turns: list[tuple[str, str, str]], with_image: bool) -> list[dict[str, str]]:
    messages = []
    for number, (_, question, answer) in enumerate(turns):
        tag = "<image>\n" if with_image and number == 0 else ""
        messages.append({"from": "human", "value": tag + question})
        messages.append({"from": "gpt", "value": answer})
    return messages


def _describe(scene: Scene) -> dict[str, Any]:
    """What is known of the scene; ``instance`` is the digit's value in the mask, ``box`` is x0, y0, x1, y1."""
    digits = [
        {"instance": instance, "digit": placed.digit, "scan": placed.scan, "box": list(placed.box)}
        for instance, placed in enumerate(scene.digits, start=1)
    ]
    return {"layout": scene.layout, "digits": digits}


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def _manifest(parameters: Parameters, scans: Scans, vocabulary: int, written: list[dict[str, Any]]) -> dict[str, Any]:
    splits = {}
    for split in SPLITS:
        shards = [{k: v for k, v in entry.items() if k != "split"} for entry in written if entry["split"] == split]
        types: Counter[str] = Counter()
        for shard in shards:
            types.update(shard.pop("question_types"))
        splits[split] = {
            "samples": sum(shard["samples"] for shard in shards),
            "scans": sum(len(numbers) for numbers in scans.by_split[split]),
            "questions": dict(sorted(types.items())),
            "shards": shards,
        }
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "dataset": DATASET,
        "tool_version": TOOL_VERSION,
        "parameters": asdict(parameters),
        "image_size": CANVAS,
        "tokenizer": "tokenizer",
        "vocabulary": vocabulary,
        "source": {"name": "scikit-learn load_digits", "scans": len(scans.digits), "sha256": scans.checksum()},
        "libraries": {name: version(name) for name in ("numpy", "pillow", "scikit-learn", "tokenizers")},
        "splits": splits,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
