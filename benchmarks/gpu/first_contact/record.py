"""What a step says: facts, and what it got beside what was expected. Each is a line on the disk before the next."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class StopsHere(Exception):
    """A rehearsal on a CPU has come to the first call that only a GPU answers."""


class Absent(Exception):
    """What a step is about is not installed here, which is no fault."""


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line in one write, and wait until the disk has it: whoever dies next does not take it along. It begins
    anew behind one that a process was killed in."""
    data = (json.dumps({**line, "time": round(time.time(), 3)}, default=str) + "\n").encode()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        whole = size == 0 or os.pread(file, 1, size - 1) == b"\n"
        os.write(file, data if whole else b"\n" + data)
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a process that was killed may have left half of one."""
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def destroyed(error: BaseException) -> bool:
    """Whether the device answers nothing any more, so that every later number of this process would be another lie."""
    return type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error)


class Record:
    """One step's lines in the results.

    Args:
        on_cpu: this is a rehearsal, and no device is there.
    """

    def __init__(self, path: Path, step: str, on_cpu: bool) -> None:
        self._path, self._step, self.on_cpu = path, step, on_cpu

    def line(self, event: str, **values: Any) -> None:
        append(self._path, {"step": self._step, "event": event, **values})

    def fact(self, name: str, value: Any) -> None:
        """A number or a text that nothing is expected of."""
        self.line("fact", name=name, value=value)
        print(f"     {name}: {value}", flush=True)

    def check(self, name: str, got: Any, expected: str, ok: bool) -> None:
        """What was got beside what was expected, in plain words."""
        got = float(f"{got:.4g}") if isinstance(got, float) else got
        self.line("check", name=name, got=got, expected=expected, ok=bool(ok))
        print(f"{'ok ' if ok else 'OFF'}  {name}: got {got}, expected {expected}", flush=True)

    def between(self, name: str, got: float, low: float, high: float, why: str = "") -> None:
        """NaN is never between."""
        self.check(name, got, f"{low:.4g} to {high:.4g}{why and f' ({why})'}", low <= got <= high)

    def at_most(self, name: str, got: float, bound: float, why: str = "") -> None:
        self.check(name, got, f"at most {bound:.4g}{why and f' ({why})'}", got <= bound)

    def at_least(self, name: str, got: float, bound: float, why: str = "") -> None:
        self.check(name, got, f"at least {bound:.4g}{why and f' ({why})'}", got >= bound)

    def near(self, name: str, got: float, expected: float, within: float, why: str = "") -> None:
        """Within a part of what is expected."""
        words = f"{expected:.5g} within {100 * within:.3g}%{why and f' ({why})'}"
        self.check(name, got, words, abs(got - expected) <= within * abs(expected))

    def only_with_a_gpu(self, what: str) -> None:
        """Ends the step here where there is no GPU.

        Raises:
            StopsHere: this is a rehearsal on a CPU.
        """
        if self.on_cpu:
            raise StopsHere(what)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of the step whose error is noted and does not keep the next part from running, unless it destroyed
        the device's context."""
        try:
            yield
        except (StopsHere, Absent):
            raise
        except Exception as error:
            traceback.print_exc()
            self.check(name, f"{type(error).__name__}: {str(error)[:300]}", "no error", False)
            if destroyed(error):
                raise
