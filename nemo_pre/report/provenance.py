"""Where a run's numbers come from: versions, dates, data."""

from __future__ import annotations

import platform
from datetime import datetime
from importlib import metadata
from typing import Any

from nemo_pre.data.manifest import read_manifest
from nemo_pre.report.runs import SEEDS, Run

PACKAGES = ("nemo-pre", "nemo_toolkit", "megatron-core", "torch", "transformer-engine", "transformers")


def provenance(run: Run, data: str | None, model: str | None) -> dict[str, str]:
    """Facts by name, in the order to be shown; versions are those installed now, which the run may not have had."""
    options = run.options or {}
    facts = {
        "report written": f"{datetime.now():%Y-%m-%d %H:%M}",
        "run": str(run.directory.resolve()),
        "experiment": str(options.get("experiment") or "unknown"),
        "seeds": ", ".join(f"{name}={options.get(name, 'unknown')}" for name in SEEDS),
        "layout": _layout(options),
        "init_from": str(options.get("init_from") or "none"),
        "vision_from": str(options.get("vision_from") or "none"),
        **_data(data),
        "versions installed": f"Python {platform.python_version()}, {', '.join(_versions())}",
    }
    return facts | ({"model of the samples": model} if model else {})


def _layout(options: dict[str, Any]) -> str:
    names = {"tensor": "TP", "pipeline": "PP", "context": "CP", "data": "DP"}
    sizes = [f"{short}{options.get(f'parallel.{name}', '?')}" for name, short in names.items()]
    return f"{' x '.join(sizes)}, {options.get('precision.name', '?')}"


def _data(data: str | None) -> dict[str, str]:
    if not data:
        return {"data": "unknown"}
    try:
        manifest = read_manifest(data)
    except ValueError as error:
        return {"data": f"{data} cannot be read now: {error}"}
    counts = ", ".join(f"{manifest.num_samples(split):,} {split}" for split in manifest.shards)
    return {
        "data": f"{manifest.dataset or 'unnamed'} in {data}: {counts} samples",
        "data fingerprint": f"{manifest.fingerprint} (of the training shards as they are now)",
    }


def _versions() -> list[str]:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    return found
