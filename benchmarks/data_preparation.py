"""How fast ``nemo-pre data prepare`` writes shards, against the disk's ceiling and against webdataset and energon.

    python -m benchmarks.data_preparation                     # 12,000 images of 60 KB
    python -m benchmarks.data_preparation --samples 40000

The input is a LLaVA-style JSON with one noise JPEG per sample, made once and read from the page cache by all sides:

``ceiling``               every image read in the order of the JSON and written behind a blank tar header, and no more
``prepare, 1 process``    nemo-pre data prepare workers=1: checks every sample, shuffles, indexes, checksums
``prepare, all cores``    the same with a process per core
``webdataset + energon``  json.load, shuffle, webdataset.ShardWriter in one process, then energon's own preparator;
                          nothing is checked

All take turns in one run on one machine; the figures are medians. What they write is equal in content.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
SHARD_SAMPLES = 1000
VAL_SAMPLES = 100


def main() -> None:
    parser = argparse.ArgumentParser(description="Samples per second of data preparation.")
    parser.add_argument("--samples", type=int, default=12_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="data_preparation_") as scratch:
        source = make_source(Path(scratch) / "source", arguments.samples)
        size = sum(file.stat().st_size for file in source.parent.rglob("*") if file.is_file())
        out = Path(scratch) / "out"
        sides: dict[str, Callable[[], None]] = {
            "ceiling": lambda: copy_bytes(source, out),
            "prepare, 1 process": lambda: run_prepare(source, out, 1),
            "prepare, all cores": lambda: run_prepare(source, out, cores),
            "webdataset + energon": lambda: run_webdataset(source, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(arguments.rounds + 1):  # the first warms up: page cache and imports
            for name, side in sides.items():
                shutil.rmtree(out, ignore_errors=True)
                start, cpu_start = time.perf_counter(), cpu_time()
                side()
                if number:
                    seconds[name].append(time.perf_counter() - start)
                    cpu_seconds[name].append(cpu_time() - cpu_start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores},
        "versions": {name: version(name) for name in ("numpy", "pillow", "webdataset", "megatron-energon")},
        "input": {"samples": arguments.samples, "megabytes": round(size / 1e6, 1), "rounds": arguments.rounds},
        "sides": {
            name: {
                "seconds_median": round(medians[name], 3),
                "seconds": [round(value, 3) for value in seconds[name]],
                "cpu_seconds_median": round(statistics.median(cpu_seconds[name]), 3),
                "samples_per_s": round(arguments.samples / medians[name]),
                "mb_per_s": round(size / 1e6 / medians[name], 1),
                "of_ceiling": round(medians["ceiling"] / medians[name], 3),
                "speed_against_webdataset": round(medians["webdataset + energon"] / medians[name], 3),
            }
            for name in sides
        },
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "data_preparation_cpu.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["sides"], indent=1))
    print(f"written to {file}")


def cpu_time() -> float:
    """CPU seconds of this process and its ended children, so that other work on the machine does not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def make_source(folder: Path, samples: int) -> Path:
    """A JSON of captions and its images, about 60 KB each."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "images").mkdir(parents=True)
    records = []
    for number in range(samples):
        name = f"{number:06d}.jpg"
        if number < 50:
            buffer = io.BytesIO()
            pixels = rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
            (folder / "images" / name).write_bytes(buffer.getvalue())
        else:
            shutil.copyfile(folder / "images" / f"{number % 50:06d}.jpg", folder / "images" / name)
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": "Noise. " * 20}]
        records.append({"id": str(number), "image": name, "conversations": turns})
    file = folder / "captions.json"
    file.write_text(json.dumps(records))
    return file


def copy_bytes(source: Path, out: Path) -> None:
    out.mkdir()
    source.read_bytes()
    blank = bytes(512)
    with (out / "all").open("wb") as tar:
        for record in sorted((source.parent / "images").iterdir()):
            content = record.read_bytes()
            tar.write(blank + content + bytes(-len(content) % 512))


def run_prepare(source: Path, out: Path, workers: int) -> None:
    from data_prep.prepare import prepare

    prepare(str(source), str(out), val_samples=VAL_SAMPLES, shard_samples=SHARD_SAMPLES, workers=workers)


def run_webdataset(source: Path, out: Path) -> None:
    import webdataset
    from megatron.energon.flavors import BaseWebdatasetFactory

    out.mkdir()
    records = json.loads(source.read_text())
    random.Random(0).shuffle(records)
    splits = {"val": records[:VAL_SAMPLES], "train": records[VAL_SAMPLES:]}
    for split, part in splits.items():
        with webdataset.ShardWriter(str(out / f"{split}-%05d.tar"), maxcount=SHARD_SAMPLES, verbose=0) as writer:
            for number, record in enumerate(part):
                image = (source.parent / "images" / record["image"]).read_bytes()
                writer.write({"__key__": f"{split}-{number:09d}", "json": record, "jpg": image})
    BaseWebdatasetFactory.prepare_dataset(
        out,
        sorted(file.name for file in out.glob("*.tar")),
        split_parts_patterns=[(split, f"{split}-.*") for split in splits],
        workers=len(os.sched_getaffinity(0)),
    )


if __name__ == "__main__":
    main()
