"""The file ``metrics.jsonl``: JSON lines that survive a kill and a full disk. Imports nothing heavy."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class MetricsFile:
    """One JSON object per line, flushed line by line. What cannot be written gives one warning and is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False
        self._torn = False
        self._cut: int | None = None

    def append(self, step: int, values: Mapping[str, Any]) -> None:
        finite = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite})
        self.cut()
        with self._tolerant():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Opened for each line: the file may be moved away, or its disk have room again.
            with self.path.open("a") as file:
                file.write(("\n" if self._torn else "") + line + "\n")
            self._torn = False

    def cut_behind(self, step: int) -> None:
        """Remove what was recorded after ``step``, which the run repeats, once there is something in its place: by the
        next line, or :meth:`cut`."""
        self._cut = step

    def cut(self) -> None:
        """Do now what :meth:`cut_behind` was told."""
        step, self._cut = self._cut, None
        with self._tolerant():
            if step is None or not self.path.exists():
                return
            kept = [line for line in read_metrics(self.path) if line["step"] <= step]
            # Written beside and renamed, so that a kill here loses nothing.
            beside = self.path.with_suffix(".tmp")
            beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
            os.replace(beside, self.path)

    def _tolerant(self) -> Tolerant:
        return Tolerant(self._failed)

    def _failed(self, error: OSError) -> None:
        self._torn = True
        if not self._warned:
            log.warning("Metrics are not recorded: %s. Training goes on; free or unlock the disk.", error)
            self._warned = True


class Tolerant:
    """Turns an ``OSError``, or an exception raised from one, into a call of ``on_error``."""

    def __init__(self, on_error: Callable[[OSError], None]) -> None:
        self._on_error = on_error

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> bool:
        cause = error if isinstance(error, OSError) else getattr(error, "__cause__", None)
        if isinstance(cause, OSError):
            self._on_error(cause)
            return True
        return False


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``, but for those that a kill or a full disk has torn."""
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict) and "step" in line:
                lines.append(line)
    return lines
