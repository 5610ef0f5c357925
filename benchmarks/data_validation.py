"""How fast data is validated, against the disk and against decoding alone, whichever is the lower.

    python -m benchmarks.data_validation                      # 30,000 JPEGs of 640 x 480, in a temporary folder
    python -m benchmarks.data_validation --folder /data/tmp   # on another disk

Validating, reading the files (with the system's cache dropped for them) and decoding the same JPEGs from memory take
turns; all figures are medians, the share that of the rounds' own. Validation and decoding use the same number of
processes; those of validation are started within its time.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
BLOCK = 1 << 20
DISTINCT = 200  # pictures that are drawn; they come again and again


def main() -> None:
    parser = argparse.ArgumentParser(description="Rate of nemo-pre data validate.")
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--folder", help="where the data is written and read (default: the system's for temporary files)"
    )
    arguments = parser.parse_args()
    load_before = os.getloadavg()[1]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        sizes = write(Path(folder), arguments.pictures, arguments.shards)
        times = measure(Path(folder), arguments.workers, arguments.rounds)
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load": round(load_before, 1),  # of the five minutes before: others may be at work
        },
        "versions": {"pillow": _version("pillow"), "python": platform.python_version()},
        "settings": {**vars(arguments), **sizes, "folder": "given" if arguments.folder else "temporary"},
        **summary(times, arguments.pictures, sizes["bytes"]),
        "seconds": {name: [round(seconds, 4) for seconds in values] for name, values in times.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / "data_validation_cpu.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "seconds"}, indent=1))
    print(f"written to {out}")


def write(folder: Path, pictures: int, shards: int) -> dict[str, int]:
    """Shards of pictures with about the detail of photographs, each with a question and an answer."""
    from data_prep.shards import write_shard
    from nemo_pre.data.manifest import FORMAT, FORMAT_VERSION, MANIFEST

    drawn = [jpeg(seed) for seed in range(min(DISTINCT, pictures))]

    def samples(number: int) -> Any:
        for picture in range(number, pictures, shards):
            turns = [
                {"from": "human", "value": f"<image>\nWhat is shown in picture {picture}?"},
                {"from": "gpt", "value": "Colours that change slowly."},
            ]
            record = json.dumps({"image": f"{picture}.jpg", "conversations": turns}).encode()
            yield f"{picture:06d}", {"jpg": drawn[picture % len(drawn)], "json": record}

    entries = [write_shard(folder, f"train-{number:05d}", samples(number)) for number in range(shards)]
    splits = {"train": {"samples": pictures, "shards": entries}}
    manifest = {"format": FORMAT, "format_version": FORMAT_VERSION, "dataset": "benchmark", "splits": splits}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    os.sync()  # what is dirty would stay in the cache
    return {"bytes": sum(entry["bytes"] for entry in entries)}


def jpeg(seed: int) -> bytes:
    """640 x 480: smooth colours, some edges and a little noise."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
    pixels = np.asarray(coarse, np.int16) + rng.integers(-6, 7, (480, 640, 3))
    pixels[120:360, rng.integers(640, size=40)] += 60
    buffer = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def measure(folder: Path, workers: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round; the processes that decode are started, and hold the JPEGs, before the clock runs."""
    from data_prep.validate.check import check
    from data_prep.validate.content import Limits

    def validate() -> None:
        report = check(folder, Limits(), workers)
        assert not report.findings, report.findings[:3]

    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), load, (str(folder),)) as pool:
        parts = [(worker, workers) for worker in range(workers)]
        sides: dict[str, Callable[[], Any]] = {
            "validation": validate,
            "disk": lambda: read(folder),
            "decoding": lambda: list(pool.map(decode, parts)),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(rounds + 1):
            for name, side in sides.items():
                drop_cache(folder)
                start = time.perf_counter()
                side()
                if number:  # the first one warms up
                    times[name].append(time.perf_counter() - start)
    return times


_jpegs: list[bytes] = []  # of a process that decodes


def load(folder: str) -> None:
    from data_prep.validate.check import named_shards
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.shards import ShardedSamples

    samples = ShardedSamples([shard for _, shard in named_shards(read_manifest(folder))])
    _jpegs.extend(samples.read_member(position, "jpg") for position in range(len(samples)))


def decode(part: tuple[int, int]) -> None:
    from PIL import Image

    first, step = part
    for content in _jpegs[first::step]:
        Image.open(io.BytesIO(content)).load()


def read(folder: Path) -> None:
    for file in folder.iterdir():
        with file.open("rb", buffering=0) as handle:
            while handle.read(BLOCK):
                pass


def drop_cache(folder: Path) -> None:
    """Drop the folder's files from the page cache, so that the next read comes from the disk; where the file system
    holds all in memory this does nothing."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def summary(times: dict[str, list[float]], pictures: int, size: int) -> dict[str, Any]:
    seconds = {name: statistics.median(values) for name, values in times.items()}
    limit = max(("disk", "decoding"), key=seconds.__getitem__)
    shares = [bound / own for bound, own in zip(times[limit], times["validation"], strict=True)]
    return {
        "samples_per_second": {name: round(pictures / value, 1) for name, value in seconds.items()},
        "mb_per_second": {name: round(size / value / 1e6, 1) for name, value in seconds.items()},
        "limit": limit,
        "share_of_limit": round(statistics.median(shares), 3),
    }


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)


if __name__ == "__main__":
    main()
