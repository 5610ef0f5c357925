"""The manifest and the list of dropped samples, from the journals of all chunks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.prepare.blend import Rows, Source
from data_prep.prepare.plan import SPLITS, Chunk, Options
from data_prep.prepare.workplace import Workplace
from nemo_pre.data.manifest import FORMAT, FORMAT_VERSION

TOOL_VERSION = 2  # raise it whenever the bytes for a source change
DROPPED = "dropped.jsonl"


def describe_request(name: str, sources: list[Source], rows: list[Rows], options: Options) -> dict[str, Any]:
    """What a directory's bytes depend on."""
    return {
        "dataset": name,
        "tool_version": TOOL_VERSION,
        "parameters": asdict(options),
        "sources": [
            {**source.described(), "rows": opened.rows, "fingerprint": opened.fingerprint()}
            for source, opened in zip(sources, rows, strict=True)
        ],
    }


def build_manifest(request: dict[str, Any], workplace: Workplace, chunks: Iterable[Chunk]) -> dict[str, Any]:
    """Writes OUT/dropped.jsonl and returns the manifest.

    Raises:
        ValueError: every training sample was dropped.
    """
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    dropped: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    taken: Counter[str] = Counter()
    repaired: Counter[str] = Counter()
    unfinished = workplace.folder / DROPPED
    with unfinished.open("w") as file:
        for chunk in chunks:
            journal = workplace.journal(chunk.name)
            shards[chunk.split] += journal["shards"]
            taken.update(journal["taken"])
            repaired.update(journal["repaired"])
            for sample in journal["dropped"]:
                dropped[chunk.split][sample["reason"]] += 1
                file.write(json.dumps({"split": chunk.split, **sample}) + "\n")
    unfinished.replace(workplace.out / DROPPED)
    if not shards["train"]:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped["train"].items()))
        raise ValueError(f"every training sample was dropped ({reasons}): see {workplace.out / DROPPED}")
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **request,
        "libraries": {name: version(name) for name in ("numpy", "pillow", "pyarrow", "pyyaml")},
        "taken": dict(sorted(taken.items())),
        "repaired": dict(sorted(repaired.items())),
        "dropped": dict(sorted((dropped["train"] + dropped["val"]).items())),
        "splits": {
            split: {
                "samples": sum(entry["samples"] for entry in shards[split]),
                "dropped": dict(sorted(dropped[split].items())),
                "shards": shards[split],
            }
            for split in SPLITS
        },
    }


def read_finished(out: Path) -> dict[str, Any] | None:
    """The manifest of a completed directory. Raises ValueError if it is none."""
    from nemo_pre.data.manifest import MANIFEST

    file = out / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); remove {out} or name another out") from error
    return content if isinstance(content, dict) else {}
