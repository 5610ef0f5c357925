"""Turning counts into quantiles, advice and a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import accumulate
from math import ceil
from typing import Any

from data_prep.stats.count import Counted, Counts
from nemo_pre.data.manifest import Manifest
from nemo_pre.whole_numbers import part_up

QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
SHARD_BYTES = 10**9  # what a shard for streaming should not exceed
SOURCES_SHOWN = 20


def summarise(counted: Counted, sequence_length: int, dp: int, workers: int) -> dict[str, Any]:
    manifest = counted.manifest
    return {
        "path": str(manifest.directory),
        "dataset": manifest.dataset,
        "tokenizer": counted.tokenizer,
        "visual_tokens": counted.visual_tokens,
        "sequence_length": sequence_length,
        "splits": {
            split: _of_split(counts, manifest, split, sequence_length) for split, counts in counted.splits.items()
        },
        "shards": advise(manifest, dp, workers),
    }


def _of_split(counts: Counts, manifest: Manifest, split: str, sequence_length: int) -> dict[str, Any]:
    longer = sum(number for length, number in counts.decoder_tokens.items() if length > sequence_length)
    readable = counts.decoder_tokens.total() if counts.decoder_tokens else 0
    pixels: Counter[int] = Counter()
    for (width, height), number in counts.sizes.items():
        pixels[width * height] += number
    return {
        "samples": counts.samples,
        "unreadable": counts.unreadable,
        "shards": len(manifest.shards[split]),
        "bytes": sum(shard.bytes for shard in manifest.shards[split]),
        "sources": dict(counts.sources.most_common()),
        "characters": quantiles(counts.characters),
        "tokens": quantiles(counts.tokens),
        "decoder_tokens": quantiles(counts.decoder_tokens),
        "longer_than_sequence_length": longer / readable if readable else None,
        "turns": quantiles(counts.turns),
        "images_per_sample": {str(number): count for number, count in sorted(counts.images.items())},
        "width": quantiles(_marginal(counts.sizes, 0)),
        "height": quantiles(_marginal(counts.sizes, 1)),
        "pixels": quantiles(pixels),
        "most_common_sizes": [[*size, number] for size, number in counts.sizes.most_common(10)],
    }


def _marginal(sizes: Mapping[tuple[int, int], int], axis: int) -> Counter[int]:
    lengths: Counter[int] = Counter()
    for size, number in sizes.items():
        lengths[size[axis]] += number
    return lengths


def quantiles(counts: Mapping[int, int]) -> dict[str, float] | None:
    """Exact, each the smallest value that at least this share does not exceed; with the mean. None of nothing."""
    if not counts:
        return None
    values = sorted(counts)
    ends = list(accumulate(counts[value] for value in values))
    found: dict[str, float] = {
        name: next(value for value, end in zip(values, ends, strict=True) if end >= part_up(share, ends[-1]))
        for name, share in QUANTILES.items()
    }
    found["mean"] = round(sum(value * number for value, number in counts.items()) / ends[-1], 3)
    return found


def advise(manifest: Manifest, dp: int, workers: int) -> dict[str, Any]:
    """How many training shards: none needed here, but a reader that streams needs one per loader process."""
    shards = manifest.shards.get("train", [])
    readers = dp * workers
    samples, size = sum(shard.samples for shard in shards), sum(shard.bytes for shard in shards)
    streaming = readers * max(1, ceil(size / SHARD_BYTES / readers))
    enough = len(shards) >= readers
    sentences = [
        f"nemo-pre reads samples at random by the indices, so any number of shards serves dp={dp} with {workers} "
        f"workers each, the present {len(shards)} included.",
        f"A reader that streams shards (WebDataset, Energon) gives each of its {dp} x {workers} loader processes "
        f"shards of its own: it needs at least {readers}, and {streaming} keep each at 1 GB or less"
        + (f", of {ceil(samples / streaming):,} samples at most" if samples else "")
        + (": the present ones are enough." if enough else "; the present ones are too few for it."),
    ]
    return {
        "dp": dp,
        "workers": workers,
        "present": len(shards),
        "needed_by_nemo_pre": 1,
        "needed_for_streaming": readers,
        "recommended_for_streaming": streaming,
        "enough_for_streaming": enough,
        "advice": " ".join(sentences),
    }


def table(result: dict[str, Any]) -> str:
    """The statistics as a table for people."""
    lines = [f"{result['path']}: {result['dataset']}, tokenizer {result['tokenizer'] or 'none: tokens not counted'}"]
    for split, of_split in result["splits"].items():
        lines.append(
            f"\n{split}: {of_split['samples']:,} samples in {of_split['shards']} shards, "
            f"{of_split['bytes'] / 1e6:,.1f} MB" + f", {of_split['unreadable']:,} unreadable (see nemo-pre data "
            f"validate)" * bool(of_split["unreadable"])
        )
        lines.append(f"  {'':16}" + "".join(f"{name:>12}" for name in (*QUANTILES, "mean")))
        for name in ("characters", "tokens", "decoder_tokens", "turns", "width", "height"):
            values = of_split[name]
            if values is not None:
                lines.append(f"  {name:16}" + "".join(f"{values[column]:12,.10g}" for column in (*QUANTILES, "mean")))
        share = of_split["longer_than_sequence_length"]
        if share is not None:
            lines.append(f"  {100 * share:.2f} % are longer than sequence_length={result['sequence_length']}")
        images = ", ".join(f"{count:,} with {number}" for number, count in of_split["images_per_sample"].items())
        lines.append(f"  images per sample: {images or 'none'}")
        sources = list(of_split["sources"].items())
        lines.append("  sources: " + ", ".join(f"{name} {count:,}" for name, count in sources[:SOURCES_SHOWN]))
        if len(sources) > SOURCES_SHOWN:
            lines.append(f"  ... and {len(sources) - SOURCES_SHOWN} more sources")
    return "\n".join([*lines, "", result["shards"]["advice"]])
