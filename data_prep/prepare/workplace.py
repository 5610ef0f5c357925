"""What is kept while a directory is being filled, so that a killed run continues: OUT/.unfinished.

A chunk is written in a folder of its own. Renaming that folder commits the chunk; its shards are then moved to their
final names, which a run that finds a committed chunk completes. So a shard under its final name is whole, and none is
ever written twice. The folder goes when the manifest is there.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shards import is_whole, write_whole

FOLDER = ".unfinished"


@dataclass(frozen=True)
class Workplace:
    out: Path

    @property
    def folder(self) -> Path:
        return self.out / FOLDER

    def order_file(self, split: str) -> Path:
        return self.folder / f"order-{split}.npy"

    def taken_file(self, source: int) -> Path:
        return self.folder / f"taken-{source}.npy"

    def source_files(self, source: int) -> Path:
        return self.folder / f"source-{source}"

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Makes the folder and keeps other runs out of it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another run is filling {self.out}: wait for it, or name another out") from error
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):  # a file system without locks
                    raise
            yield

    def claim(self, request: dict[str, Any]) -> None:
        """Notes what is being prepared. Raises ValueError if the folder was left by something else."""
        file = self.folder / "request.json"
        if file.is_file() and json.loads(file.read_text()) != request:
            raise ValueError(
                f"out={self.out} holds an unfinished preparation of other data or with other options: give the same "
                f"again, remove it, or name another out"
            )
        write_whole(file, json.dumps(request).encode())

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- chunks ------------------------------------------------------------------------------------------------

    def staged(self, chunk: str) -> Path:
        return self.folder / "staged" / f"{chunk}.{os.getpid()}"

    def committed(self, chunk: str) -> Path:
        return self.folder / "chunks" / chunk

    def journal(self, chunk: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.committed(chunk) / "journal.json").read_text())
        return content

    def commit(self, chunk: str, staged: Path) -> None:
        self.committed(chunk).parent.mkdir(exist_ok=True)
        os.rename(staged, self.committed(chunk))

    def publish(self, chunk: str) -> None:
        """Moves a committed chunk's files to where they belong, the tars last."""
        folder = self.committed(chunk)
        files = [file for file in folder.iterdir() if file.name != "journal.json"]
        for file in sorted(files, key=lambda file: (file.suffix == ".tar", file.name)):
            os.replace(file, self.out / file.name)

    def clear_staged(self) -> None:
        shutil.rmtree(self.folder / "staged", ignore_errors=True)

    def is_finished(self, chunk: str) -> bool:
        """Whether the chunk is committed and its shards are there; completes their move, if that was cut short."""
        if not self.committed(chunk).is_dir():
            return False
        self.publish(chunk)
        if all(is_whole(self.out, entry) for entry in self.journal(chunk)["shards"]):
            return True
        shutil.rmtree(self.committed(chunk))  # someone removed or cut a shard meanwhile
        return False
