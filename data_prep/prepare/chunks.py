"""A chunk of samples, read, checked and written: the work of one process."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.prepare.arrays import mapped_array
from data_prep.prepare.blend import Rows
from data_prep.prepare.candidate import BadSample
from data_prep.prepare.checks import CheckedSample, checked_sample
from data_prep.prepare.parquet import ParquetRows
from data_prep.prepare.plan import Chunk, Options, chunk_of
from data_prep.prepare.workplace import Workplace
from data_prep.shards import ShardWriter, member_bytes, write_whole


@dataclass(frozen=True)
class Job:
    """All that the processes need: ``names`` and ``rows`` of the sources, whose rows are counted on through all.

    ``checksums`` of the tars by file, where damaged shards of complete data are written again.
    """

    workplace: Workplace
    names: tuple[str, ...]
    rows: tuple[Rows, ...]
    options: Options
    raise_errors: bool
    checksums: dict[str, str] | None = None

    def unpack(self, task: tuple[int, int]) -> int:
        """Unpacks one row group of a parquet source; returns how many rows it took."""
        number, group = task
        return self._parquet(number).unpack(group, self.rows_taken(number, group))

    def rows_taken(self, number: int, group: int) -> np.ndarray:
        """The rows of a parquet source that are taken and lie in ``group``, sorted."""
        taken = mapped_array(self.workplace.taken_file(number))
        start, stop = self._parquet(number).rows_of(group)
        return taken[np.searchsorted(taken, start) : np.searchsorted(taken, stop)]

    def _parquet(self, number: int) -> ParquetRows:
        source = self.rows[number]
        assert isinstance(source, ParquetRows)
        return source

    def write(self, chunk: Chunk) -> int:
        """Writes and publishes the shards of ``chunk``; returns how many samples it looked at.

        Raises:
            ValueError: a bad sample, if these are not to be dropped; other bytes than ``checksums`` say.
        """
        staged = self.workplace.staged(chunk.name)
        staged.mkdir(parents=True)
        try:
            journal = self._write_shards(chunk, staged)
            self._compare(chunk, journal)
            write_whole(staged / "journal.json", json.dumps(journal).encode())
            self.workplace.commit(chunk.name, staged)
        except BaseException:
            shutil.rmtree(staged, ignore_errors=True)  # on a full disk above all
            raise
        self.workplace.publish(chunk.name)
        return chunk.stop - chunk.start

    def _compare(self, chunk: Chunk, journal: dict[str, Any]) -> None:
        if self.checksums is None:
            return
        expected = {file: digest for file, digest in self.checksums.items() if chunk_of(file) == chunk.name}
        if expected != {entry["file"]: entry["sha256"] for entry in journal["shards"]}:
            raise ValueError(
                f"{chunk.name} does not come out as {self.workplace.out} had it, so the source has changed since: "
                f"remove that and prepare it anew"
            )

    def _write_shards(self, chunk: Chunk, staged: Path) -> dict[str, Any]:
        largest = self.options.shard_mb * 10**6
        writer: ShardWriter | None = None
        entries: list[dict[str, Any]] = []
        dropped: list[dict[str, str]] = []
        taken: Counter[str] = Counter()
        repaired: Counter[str] = Counter()
        try:
            for key, name, sample in self._samples(chunk, dropped):
                size = sum(member_bytes(content) for content in sample.members.values())
                if writer is not None and writer.bytes + size > largest:
                    entries.append(writer.finish())
                    writer = None
                if writer is None:
                    writer = ShardWriter(staged, chunk.name + (f"-{len(entries)}" if entries else ""))
                writer.add(key, sample.members, text_chars=sample.text_chars, image_sizes=sample.image_sizes)
                taken[name] += 1
                repaired.update(sample.repaired)
            if writer is not None:
                entries.append(writer.finish())
        finally:
            if writer is not None:
                writer.file.close()
        return {"shards": entries, "dropped": dropped, "taken": taken, "repaired": repaired}

    def _samples(self, chunk: Chunk, dropped: list[dict[str, str]]) -> Iterator[tuple[str, str, CheckedSample]]:
        order = mapped_array(self.workplace.order_file(chunk.split))
        starts = np.cumsum([0, *(source.rows for source in self.rows)])
        for position in range(chunk.start, chunk.stop):
            sample = int(order[position])
            number = int(np.searchsorted(starts, sample, side="right")) - 1
            row = sample - int(starts[number])
            name, origin = self.names[number], self.rows[number].origin(row)
            try:
                checked = checked_sample(self.rows[number].read(row), f"{name}:{origin}", self.options)
            except BadSample as error:
                if self.raise_errors:
                    raise ValueError(
                        f"{name}:{origin} is bad ({error.reason}: {error.detail}): repair it, or drop such samples "
                        f"with on_error=drop"
                    ) from error
                dropped.append({"source": name, "origin": origin, "reason": error.reason, "detail": error.detail})
            else:
                yield f"{chunk.split}-{position:09d}", name, checked
