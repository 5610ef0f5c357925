"""Progress of a long preparation: one living line on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from typing import TextIO


class Progress:
    def __init__(self, what: str, total: int, stream: TextIO | None = None, log_seconds: float = 10.0):
        self.what, self.total, self.done = what, total, 0
        self.stream = stream or sys.stderr
        self.seconds_between = 0.2 if self.stream.isatty() else log_seconds
        self.start = self.last = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        finished = self.done >= self.total
        if not finished and now - self.last < self.seconds_between:
            return
        self.last = now
        elapsed = max(now - self.start, 1e-9)
        rate = self.done / elapsed
        left = f"took {elapsed:.0f} s" if finished else f"ETA {(self.total - self.done) / max(rate, 1e-9):.0f} s"
        line = f"{self.what}: {self.done:,}/{self.total:,} ({rate:,.0f}/s, {left})"
        if self.stream.isatty():
            self.stream.write(f"\r\x1b[2K{line}" + ("\n" if finished else ""))
        else:
            self.stream.write(line + "\n")
        self.stream.flush()
