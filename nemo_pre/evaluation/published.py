"""The papers' rows of ``published.yaml``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from nemo_pre.evaluation.suites import BENCHMARKS

FILE = Path(__file__).with_name("published.yaml")
DEFAULT = {"pre": "pre_clip_frozen_vicuna_7b", "laver": "laver_siglip2_qwen25_7b"}  # by suite


@dataclass(frozen=True)
class Published:
    """A paper's model without and with its regularizer: numbers by benchmark, as printed."""

    name: str
    paper: str
    model: str
    baseline: dict[str, float]
    regularized: dict[str, float]
    sources: tuple[str, ...]


@cache
def published_rows() -> dict[str, Published]:
    import yaml

    rows = {}
    for name, row in yaml.safe_load(FILE.read_text()).items():
        baseline: dict[str, float] = {}
        regularized: dict[str, float] = {}
        for table in row["tables"]:
            assert table["baseline"].keys() == table["regularized"].keys() <= BENCHMARKS.keys(), name
            assert not table["baseline"].keys() & baseline.keys(), name
            baseline |= table["baseline"]
            regularized |= table["regularized"]
        sources = tuple(table["source"] for table in row["tables"])
        rows[name] = Published(name, row["paper"], row["model"], baseline, regularized, sources)
    return rows


def published_row(name: str | None, suite: str | None) -> Published | None:
    """The row that is asked for, or else the suite's.

    Raises:
        ValueError: there is no such row.
    """
    name = name or DEFAULT.get(suite or "")
    if name is None:
        return None
    rows = published_rows()
    if name not in rows:
        raise ValueError(f"published={name} is unknown: choose one of {', '.join(rows)}.")
    return rows[name]
