"""Samples per second of the training loader, against what decoding alone allows and against other loaders.

    python -m benchmarks.data_loading                     # 336 pixels, one loader process and one per core

Sides, in turns on the same synthetic JPEG shards (640 x 480, one image and a conversation per sample):

- ``decode``: as many processes do nothing but turn JPEG bytes, which lie in memory, into RGB;
- ``decode and resize``: they also resize and normalise, as every loader below must;
- ``ours``: the training loader, shuffled over the whole set, tokenized and collated;
- ``webdataset`` and ``energon``: those libraries' loaders with their own shuffling (a buffer of 100 samples), giving
  each sample to the same tokenization, image transform and collation.

A loader is timed when its queues have settled: batches are thrown away first. Figures are medians over rounds; the
order of the sides changes from round to round.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
WIDTH, HEIGHT, QUALITY = 640, 480, 90
IMAGE_SIZE, TILE_TOKENS, SEQUENCE_LENGTH = 336, 576, 2048
BATCH, SHUFFLE_BUFFER = 8, 100
WORDS = ["the", "a", "red", "small", "car", "dog", "stands", "beside", "two", "people", "what", "is", "how", "many"]


def main() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description="Samples per second of the training loader.")
    parser.add_argument("--samples", type=int, default=1000, help="in the shards")
    parser.add_argument("--timed", type=int, default=400, help="per side and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=sorted({1, cores}))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="data_loading_") as scratch:
        shards = write_shards(Path(scratch), arguments.samples)
        image_bytes = [members["jpg"] for _, members in samples(64)]
        rates = {workers: measure(shards, image_bytes, workers, arguments) for workers in arguments.workers}
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": cores},
        "versions": versions("torch", "pillow", "transformers", "webdataset", "megatron-energon"),
        "samples": arguments.samples,
        "jpeg": {"size": [WIDTH, HEIGHT], "mean_bytes": round(statistics.mean(map(len, image_bytes)))},
        "image_size": IMAGE_SIZE,
        "batch": BATCH,
        "rounds": arguments.rounds,
        "samples_per_second": rates,
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / "data_loading_cpu.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rates, indent=1))
    print(f"written to {out}")


def measure(
    shards: Path, image_bytes: list[bytes], workers: int, arguments: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The median of each side, every round's value, and the median as a fraction of decoding alone."""
    timed = arguments.timed
    sides: dict[str, Callable[[], float]] = {
        "decode": lambda: rate_of_processes(decode, image_bytes, workers, timed),
        "decode and resize": lambda: rate_of_processes(decode_and_resize, image_bytes, workers, timed),
        "ours": lambda: rate_of_loader(partial(our_loader, shards, workers), workers, timed),
        "webdataset": lambda: rate_of_loader(partial(webdataset_loader, shards, workers), workers, timed),
        "energon": lambda: rate_of_loader(partial(energon_loader, shards, workers), workers, timed),
    }
    rounds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name in random.Random(number).sample(list(sides), len(sides)):
            rounds[name].append(sides[name]())
            print(f"{workers} process(es), {name}: {rounds[name][-1]:.1f} samples/s", file=sys.stderr, flush=True)
    medians = {name: statistics.median(values) for name, values in rounds.items()}
    return {
        name: {
            "median": round(medians[name], 1),
            "of_decode": round(medians[name] / medians["decode"], 3),
            "rounds": [round(value, 1) for value in rounds[name]],
        }
        for name in sides
    }


# --- what is read ---------------------------------------------------------------------------------------------------


def samples(count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Pictures of smooth colours and fine noise, about as large as photographs of their size; 150 words of text."""
    import numpy as np
    from PIL import Image

    for number in range(count):
        rng = np.random.default_rng(number)
        smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT), 3)
        noise = rng.normal(0, 6, (HEIGHT, WIDTH, 1))
        file = io.BytesIO()
        Image.fromarray(np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=QUALITY
        )
        text = rng.choice(WORDS, 150).tolist()
        conversation = [
            {"from": "human", "value": "<image>\n" + " ".join(text[:30])},
            {"from": "gpt", "value": " ".join(text[30:])},
        ]
        record = {"id": str(number), "image": f"{number}.jpg", "conversations": conversation}
        yield f"{number:06d}", {"json": json.dumps(record).encode(), "jpg": file.getvalue()}


def write_shards(directory: Path, count: int, per_shard: int = 100) -> Path:
    """A prepared set that is at once a WebDataset and, with its metadata, an Energon dataset."""
    import yaml
    from megatron.energon.flavors.webdataset.prepare import WebdatasetPreparator

    from data_prep.shards import write_shard

    content = list(samples(count))
    entries = [
        write_shard(directory, f"train-{start // per_shard:05d}", content[start : start + per_shard])
        for start in range(0, count, per_shard)
    ]
    manifest = {
        "format": "nemo-pre shards",
        "format_version": 1,
        "dataset": "synthetic",
        "splits": {"train": {"samples": count, "shards": entries}},
    }
    (directory / "manifest.json").write_text(json.dumps(manifest))
    names = [entry["file"] for entry in entries]
    WebdatasetPreparator.prepare_dataset(directory, names, split_parts_ratio=[("train", 1.0)], workers=1)
    crude = {"__module__": "megatron.energon", "__class__": "CrudeWebdataset", "auto_decode": False}
    (directory / ".nv-meta" / "dataset.yaml").write_text(yaml.dump(crude))
    return directory


# --- what decoding alone allows -------------------------------------------------------------------------------------


def rate_of_processes(
    work: Callable[[list[bytes], int], None], images: list[bytes], workers: int, timed: int
) -> float:
    """Images per second of ``workers`` processes, each with its share."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers + 1)

    def run() -> None:
        work(images, 8)
        barrier.wait()
        work(images, timed // workers)
        barrier.wait()

    processes = [context.Process(target=run) for _ in range(workers)]
    for process in processes:
        process.start()
    barrier.wait()
    start = time.perf_counter()
    barrier.wait()
    rate = timed // workers * workers / (time.perf_counter() - start)
    for process in processes:
        process.join()
    return rate


def decode(images: list[bytes], count: int) -> None:
    from PIL import Image

    for number in range(count):
        Image.open(io.BytesIO(images[number % len(images)])).convert("RGB")


def decode_and_resize(images: list[bytes], count: int) -> None:
    how = preprocessing()
    for number in range(count):
        how.encode_image(images[number % len(images)], "benchmark")


# --- loaders --------------------------------------------------------------------------------------------------------


def rate_of_loader(build: Callable[[], Any], workers: int, timed: int) -> float:
    """Samples per second once the loader's queues have settled; in a process of its own, which takes it along."""
    context = multiprocessing.get_context("fork")
    receives, sends = context.Pipe(duplex=False)

    def run() -> None:
        batches = iter(build())
        for _ in range(4 * workers + SHUFFLE_BUFFER // BATCH):
            next(batches)
        start = time.perf_counter()
        for _ in range(timed // BATCH):
            next(batches)
        sends.send(timed // BATCH * BATCH / (time.perf_counter() - start))

    process = context.Process(target=run)
    process.start()
    rate = float(receives.recv())
    process.join()
    return rate


def our_loader(shards: Path, workers: int) -> Any:
    from torch.utils.data import DataLoader

    from nemo_pre.data.dataset import ConversationDataset
    from nemo_pre.data.manifest import read_manifest
    from nemo_pre.data.sampler import BatchShape, BlendedStream, TrainingBatches

    dataset = ConversationDataset(read_manifest(shards), "train", preprocessing())
    stream = BlendedStream(dataset.sizes, [1.0], seed=0)
    batches = TrainingBatches(stream, BatchShape(BATCH, BATCH, 0, 1), consumed_samples=0)
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, collate_fn=collate())  # type: ignore[arg-type]


def webdataset_loader(shards: Path, workers: int) -> Any:
    import webdataset as wds

    tars = sorted(map(str, shards.glob("*.tar")))
    dataset = wds.WebDataset(tars, resampled=True).shuffle(SHUFFLE_BUFFER)
    dataset = dataset.map(lambda raw: item(raw["__key__"], raw["json"], raw["jpg"]))
    return wds.WebLoader(dataset.batched(BATCH, collation_fn=collate()), batch_size=None, num_workers=workers)


def energon_loader(shards: Path, workers: int) -> Any:
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        WorkerConfig,
        basic_sample_keys,
        get_loader,
        get_train_dataset,
    )

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(lambda raw: {**basic_sample_keys(raw), "item": item("", raw["json"], raw["jpg"])})]

        def batch(self, samples: list[Any]) -> Any:
            return collate()([sample["item"] for sample in samples])

    dataset = get_train_dataset(
        shards,
        batch_size=BATCH,
        shuffle_buffer_size=SHUFFLE_BUFFER,
        max_samples_per_sequence=None,
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=workers),
        task_encoder=Encoder(),
    )
    return get_loader(dataset)


def item(key: str, record: bytes, image: bytes) -> Any:
    from nemo_pre.data.conversation import encode
    from nemo_pre.data.dataset import Item

    how = preprocessing()
    turns = json.loads(record)["conversations"]
    encoded = encode(turns, how.tokenizer, how.chat_template, how.max_text_tokens, num_images=1, where=key)
    return Item(key, encoded.tokens, encoded.labels, [how.encode_image(image, key)])


def collate() -> Any:
    from nemo_pre.data.collate import Collate

    return Collate(preprocessing().max_text_tokens, padding_id=0)


@lru_cache(maxsize=1)
def preprocessing() -> Any:
    """One for all sides."""
    from nemo_pre.data.dataset import Preprocessing

    text = SEQUENCE_LENGTH - TILE_TOKENS + 1
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    return Preprocessing(byte_tokenizer(), "vicuna_v1", text, TILE_TOKENS, IMAGE_SIZE, *clip)


def byte_tokenizer() -> Any:
    """A byte-level BPE that knows the words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def versions(*packages: str) -> dict[str, str]:
    from importlib import metadata

    return {package: metadata.version(package) for package in packages}


if __name__ == "__main__":
    main()
