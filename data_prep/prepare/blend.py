"""The sources of one shard set: what each is, and how many samples are taken of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import yaml

from data_prep.prepare.candidate import Candidate
from data_prep.prepare.coco_stuff import CocoStuff, mask_folder
from data_prep.prepare.llava import LlavaRecords
from data_prep.prepare.parquet import COLUMNS, ParquetRows, kind_of_columns, parquet_files
from nemo_pre.whole_numbers import part_nearest

KINDS = ("llava", "llava_onevision", "finevision", "coco_stuff")


@dataclass(frozen=True)
class Source:
    """``weight`` times its rows, or ``samples`` of them (repeated if it has fewer), but at most ``cap``."""

    path: Path
    kind: str
    name: str
    images: Path | None = None
    masks: Path | None = None
    weight: float | None = None
    samples: int | None = None
    cap: int | None = None

    def __post_init__(self) -> None:
        if not self.path.exists():
            raise ValueError(f"{self.path} does not exist: name the dataset as it was downloaded")
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind} is not one of auto, {', '.join(KINDS)}")
        if self.weight is not None and self.samples is not None:
            raise ValueError(f"source {self.name} has a weight and a number of samples: give one of them")
        for option, value, kinds in (
            ("weight", self.weight, (int, float)),
            ("samples", self.samples, int),
            ("cap", self.cap, int),
        ):
            if value is not None and (not isinstance(value, kinds) or isinstance(value, bool) or not value > 0):
                raise ValueError(f"source {self.name} has {option}={value}: give a number above 0")
        for option, folder, kinds_with in (
            ("images", self.images, ("llava", "coco_stuff")),
            ("masks", self.masks, ("coco_stuff",)),
        ):
            if folder is not None and self.kind not in kinds_with:
                raise ValueError(f"source {self.name} is {self.kind}, which has no {option} folder: leave that out")
            if folder is not None and not folder.is_dir():
                raise ValueError(f"source {self.name} has {option}={folder}, which is not a folder")

    def num_taken(self, rows: int) -> int:
        wanted = self.samples if self.samples is not None else part_nearest(self.weight or 1, rows)
        return min(wanted, self.cap) if self.cap is not None else wanted

    def described(self) -> dict[str, Any]:
        """What the bytes depend on; not where it lies."""
        return {key: value for key, value in asdict(self).items() if key not in ("path", "images", "masks")}


class Rows(Protocol):
    """An opened source: rows that can be read in any order, in any process."""

    @property
    def rows(self) -> int: ...

    def fingerprint(self) -> dict[str, Any]: ...

    def origin(self, row: int) -> str: ...

    def read(self, row: int) -> Candidate:
        """The candidate of a row. Raises BadSample."""


def open_rows(source: Source, scratch: Path) -> Rows:
    """``scratch`` is a path for an index or unpacked rows; it lives until the data is complete."""
    if source.kind == "llava":
        return LlavaRecords.open(source.path, source.images, scratch)
    if source.kind == "coco_stuff":
        return CocoStuff.open(source.path, source.images, source.masks)
    return ParquetRows.open(source.path, source.kind, scratch)


def single_source(path: str, kind: str, images: str | None, masks: str | None, name: str | None) -> Source:
    """A source given by options. Raises ValueError."""
    place = Path(path)
    return Source(
        path=place,
        kind=find_kind(place) if kind == "auto" else kind,
        name=name or place.stem or place.resolve().name,
        images=Path(images) if images else None,
        masks=Path(masks) if masks else None,
    )


def sources_of_blend(path: str) -> tuple[str, list[Source]]:
    """The blend's name and sources. Raises ValueError: not readable, or an entry with unknown or missing keys."""
    file = Path(path)
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file} is not a readable YAML file ({error})") from error
    entries = content.get("sources") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) - {"name", "sources"}:
        raise ValueError(f"{file} must hold a list of sources, and a name if you like")
    sources = [_source_of_entry(file, number, entry) for number, entry in enumerate(entries)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{file} has two sources of one name ({', '.join(names)}): give each its own name")
    return str(content.get("name") or file.stem), sources


def _source_of_entry(file: Path, number: int, entry: Any) -> Source:
    known = {field.name for field in fields(Source)}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str) or set(entry) - known:
        raise ValueError(f"{file}: source {number} must have a path, and of the rest only {', '.join(sorted(known))}")
    places = {key: file.parent / entry[key] for key in ("path", "images", "masks") if entry.get(key)}
    kind = entry.get("kind", "auto")
    return Source(
        **places,
        kind=find_kind(places["path"]) if kind == "auto" else kind,
        name=str(entry.get("name") or places["path"].stem),
        **{key: entry[key] for key in ("weight", "samples", "cap") if key in entry},
    )


def find_kind(path: Path) -> str:
    """The kind of dataset at ``path``. Raises ValueError."""
    if not path.exists():
        raise ValueError(f"{path} does not exist: name the dataset as it was downloaded")
    if path.suffix in (".json", ".jsonl"):
        return "llava"
    files = parquet_files(path) if path.is_dir() or path.suffix == ".parquet" else []
    if files:
        kind = kind_of_columns(files[0])
        if kind is None:
            needed = " or ".join(", ".join(columns) for columns in COLUMNS.values())
            raise ValueError(f"{files[0]} has not the columns of a known dataset ({needed})")
        return kind
    if path.is_dir() and mask_folder(path) is not None:
        return "coco_stuff"
    if path.is_dir() and any(any(path.glob(pattern)) for pattern in ("*.json", "*.jsonl")):
        return "llava"
    raise ValueError(f"what kind of dataset {path} holds cannot be seen from its files: give kind={'|'.join(KINDS)}")
