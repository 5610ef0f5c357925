"""Folders of parquet files with the images inside, as Hugging Face's datasets library writes them.

LLaVA-OneVision (https://huggingface.co/datasets/lmms-lab/LLaVA-OneVision-Data): one folder per subset with
``train-*.parquet``; columns id, conversations (list of {from, value}), image ({bytes, path}, null for text),
data_source. FineVision (https://huggingface.co/datasets/HuggingFaceM4/FineVision): one folder per subset with
``train-*.parquet``; columns images (list of {bytes, path}), texts (list of {user, assistant}), source and ratings,
which are not read. Its texts have no image tags: the images stand before the first question.

An image column of other makers is read too: a picture or a list of pictures, each {bytes, path}, bare bytes, or a path
below the folder. A row that is otherwise is a bad sample, whatever its columns hold.

A row group can only be read as a whole, and a global shuffle asks for its rows one at a time. So the rows that are
taken are unpacked first, each row group into one file beside an index of its rows.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.prepare.arrays import mapped_array
from data_prep.prepare.candidate import BadSample, Candidate, read_inside
from nemo_pre.data.conversation import IMAGE_TAG

COLUMNS = {"llava_onevision": ("id", "conversations", "image"), "finevision": ("images", "texts")}
ROWS_AT_ONCE = 16  # of a row group as Python objects; a row may hold many large images
READ_BUFFER = 1 << 22  # bytes; without one, pyarrow reads the whole of a row group's images first


@dataclass(frozen=True)
class ParquetRows:
    kind: str
    folder: Path
    groups: tuple[tuple[str, int], ...]  # (file relative to the folder, row group)
    ends: tuple[int, ...]  # rows up to the end of each group
    sha256: str
    unpacked: Path  # folder of unpacked rows

    @classmethod
    def open(cls, path: Path, kind: str, scratch: Path) -> ParquetRows:
        digest, groups, sizes = hashlib.sha256(), [], []
        for file in parquet_files(path):
            name = file.relative_to(path).as_posix() if path.is_dir() else file.name
            metadata = _metadata(file)
            missing = set(COLUMNS[kind]) - set(metadata.schema.to_arrow_schema().names) - {"id"}
            if missing:
                raise ValueError(f"{file} has no column {' or '.join(sorted(missing))}: it is no {kind} data")
            digest.update(f"{name} {file.stat().st_size}\n".encode() + _footer(file))
            for group in range(metadata.num_row_groups):
                groups.append((name, group))
                sizes.append(metadata.row_group(group).num_rows)
        folder = path if path.is_dir() else path.parent
        return cls(kind, folder, tuple(groups), tuple(accumulate(sizes)), digest.hexdigest(), scratch)

    @property
    def rows(self) -> int:
        return self.ends[-1] if self.ends else 0

    def fingerprint(self) -> dict[str, Any]:
        return {"files": len({name for name, _ in self.groups}), "sha256": self.sha256}

    def origin(self, row: int) -> str:
        """File and row of the whole data, for the groups of a file follow each other."""
        name, group = self.groups[self._group_of(row)]
        start, _ = self.rows_of(self._group_of(row) - group)
        return f"{name}[{row - start}]"

    # --- unpacking ---------------------------------------------------------------------------------------------

    def groups_of(self, rows: np.ndarray) -> list[int]:
        """The row groups that hold any of the sorted ``rows``."""
        starts = np.array([0, *self.ends])
        counts = np.diff(np.searchsorted(rows, starts))
        return np.flatnonzero(counts).tolist()

    def is_unpacked(self, group: int) -> bool:
        return self._index_file(group).is_file()

    def rows_of(self, group: int) -> tuple[int, int]:
        """The first row of the group, and that after its last."""
        return (self.ends[group - 1] if group else 0), self.ends[group]

    def unpack(self, group: int, wanted: np.ndarray) -> int:
        """Writes the ``wanted`` rows of ``group`` (sorted, counted through the source); returns how many.

        Raises:
            ValueError: the row group is damaged.
        """
        import pyarrow as pa

        start, _ = self.rows_of(group)
        self.unpacked.mkdir(parents=True, exist_ok=True)
        data = self._data_file(group)
        unfinished = data.with_name(f"{data.name}.{os.getpid()}")
        places = []
        try:
            with unfinished.open("wb") as file:
                for row, content in self._contents(group, wanted - start):
                    places.append((start + row, file.tell(), len(content)))
                    file.write(content)
            os.replace(unfinished, data)
            with unfinished.open("wb") as file:
                np.save(file, np.array(places, dtype=np.int64).reshape(-1, 3))
            os.replace(unfinished, self._index_file(group))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the file system, and not pyarrow's
            name, number = self.groups[group]
            raise ValueError(
                f"{self.folder / name}: row group {number} is damaged ({error}): download it again"
            ) from error
        finally:
            unfinished.unlink(missing_ok=True)
        return len(wanted)

    def _contents(self, group: int, wanted: np.ndarray) -> Iterator[tuple[int, bytes]]:
        import pyarrow.parquet as pq

        name, number = self.groups[group]
        chosen = set(wanted.tolist())
        with pq.ParquetFile(self.folder / name, buffer_size=READ_BUFFER) as file:
            columns = [column for column in COLUMNS[self.kind] if column in file.schema_arrow.names]
            row = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[number], columns=columns):
                for offset in range(batch.num_rows):
                    if row + offset in chosen:
                        yield row + offset, _packed_or_bad(self.kind, batch.slice(offset, 1))
                row += batch.num_rows

    # --- reading -----------------------------------------------------------------------------------------------

    def read(self, row: int) -> Candidate:
        group = self._group_of(row)
        index = mapped_array(self._index_file(group))
        number = int(np.searchsorted(index[:, 0], row))
        assert index[number, 0] == row, f"row {row} of {self.folder} was not unpacked"
        _, start, size = index[number].tolist()
        descriptor = os.open(self._data_file(group), os.O_RDONLY)
        try:
            header, _, blob = os.pread(descriptor, size, start).partition(b"\n")
        finally:
            os.close(descriptor)
        fields = json.loads(header)
        if "bad" in fields:
            raise BadSample(*fields["bad"])
        images, ends = fields["images"], [0, *accumulate(size or 0 for size in fields["sizes"])]

        def load(number: int) -> bytes:
            if fields["sizes"][number] is None:
                return read_inside(self.folder, images[number])
            return blob[ends[number] : ends[number + 1]]

        identity = fields["id"] if fields["id"] is not None else self.origin(row)
        return Candidate(str(identity), fields["conversations"], images, load)

    def _group_of(self, row: int) -> int:
        return bisect.bisect_right(self.ends, row)

    def _data_file(self, group: int) -> Path:
        return self.unpacked / f"{group:06d}.rows"

    def _index_file(self, group: int) -> Path:
        return self.unpacked / f"{group:06d}.npy"


def parquet_files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.parquet"))


def kind_of_columns(path: Path) -> str | None:
    """Which dataset a parquet file's columns are of."""
    names = set(_metadata(path).schema.to_arrow_schema().names)
    return next((kind for kind, columns in COLUMNS.items() if names.issuperset(set(columns) - {"id"})), None)


def _packed_or_bad(kind: str, row: Any) -> bytes:
    """A row as :func:`_packed` gives it, or a line of JSON with what is wrong with it.

    Args:
        row: a record batch of this row alone.
    """
    try:
        try:
            values = row.to_pylist()[0]
        except Exception as error:  # text that is not UTF-8, times that Python lacks, types that pyarrow lacks
            raise BadSample("broken_record", f"a column cannot be read ({error or repr(error)})") from error
        return _packed(kind, values)
    except BadSample as error:
        return json.dumps({"bad": [error.reason, error.detail]}).encode() + b"\n"


def _packed(kind: str, row: dict[str, Any]) -> bytes:
    """A line of JSON and the images after it. Raises BadSample."""
    pictures = _pictures(row["images" if kind == "finevision" else "image"])
    if kind == "finevision":
        conversations: Any = _turns_of_texts(row["texts"], len(pictures))
    else:
        conversations = row["conversations"]
    identity = row.get("id")
    fields = {
        "id": None if identity is None else str(identity),
        "conversations": conversations,
        "images": [path or f"image-{number}" for number, (_, path) in enumerate(pictures)],
        "sizes": [None if content is None else len(content) for content, _ in pictures],
    }
    try:
        header = json.dumps(fields).encode()
    except (TypeError, ValueError) as error:
        raise BadSample("broken_record", f"its conversations are no texts ({error})") from error
    return header + b"\n" + b"".join(content or b"" for content, _ in pictures)


def _pictures(column: Any) -> list[tuple[bytes | None, str | None]]:
    """The content of each picture, or the path that it is read from. Raises BadSample."""
    if column is None or (isinstance(column, dict) and all(value is None for value in column.values())):
        return []  # a struct of nulls is a null that went through a library
    return [_picture(value, number) for number, value in enumerate(column if isinstance(column, list) else [column])]


def _picture(value: Any, number: int) -> tuple[bytes | None, str | None]:
    content, path = value, None
    if isinstance(value, dict):
        content, path = value.get("bytes"), value.get("path")
    elif isinstance(value, str):
        content, path = None, value
    if content is None and not path:
        raise BadSample("missing_image", f"image {number} is null")
    if not isinstance(content, bytes | None) or not isinstance(path, str | None):
        kinds = ", ".join(sorted({type(part).__name__ for part in (content, path) if part is not None}))
        raise BadSample("broken_record", f"image {number} is {kinds} and neither bytes, {{bytes, path}} nor a path")
    return content, path


def _turns_of_texts(texts: Any, num_images: int) -> list[dict[str, Any]]:
    """FineVision's texts as LLaVA's turns. Raises BadSample."""
    if not isinstance(texts, list):
        raise BadSample("broken_record", f"its texts are {_named(texts)} instead of a list")
    turns = []
    for number, text in enumerate(texts):
        if not isinstance(text, dict) or not {"user", "assistant"} <= text.keys():
            raise BadSample("broken_record", f"text {number} is {_named(text)} instead of {{user, assistant}}")
        for speaker, name in (("human", "user"), ("gpt", "assistant")):
            if not isinstance(text[name], str):
                raise BadSample("broken_record", f"the {name} of text {number} is {_named(text[name])}, not a text")
            turns.append({"from": speaker, "value": text[name]})
    if turns and not any(IMAGE_TAG in turn["value"] for turn in turns[::2]):
        turns[0]["value"] = f"{IMAGE_TAG}\n" * num_images + turns[0]["value"]
    return turns


def _named(value: Any) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _metadata(file: Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} is not a readable parquet file ({error}): download it again") from error


def _footer(file: Path) -> bytes:
    """The metadata at the end of a parquet file: its length stands in 4 bytes before the closing PAR1."""
    with file.open("rb") as content:
        content.seek(-8, os.SEEK_END)
        size = int.from_bytes(content.read(4), "little")
        content.seek(-8 - size, os.SEEK_END)
        return content.read(size)
