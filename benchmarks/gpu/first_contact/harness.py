"""Steps one after another, each a process of its own under a limit; whatever one does, the next begins.

The processes of the steps that come next are started ahead: they import what they need and wait at a gate (a line on
their input), so that ten seconds of imports pass while another step computes, and nothing is shared that one of them
could poison. Forks of one process that has imported everything would not do: importing NeMo asks CUDA for the device's
capability, after which no fork may use it. A step's time begins at its gate.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.first_contact import processes, record

OK, OFF, REHEARSED, UP_TO, ABSENT = "ok", "off", "rehearsed", "up to CUDA", "absent"
DIED, HUNG, FULL, DROPPED = "died", "hung", "memory", "dropped"
BAD = (OFF, DIED, HUNG, FULL, DROPPED)
HEAD, TAIL = 256 << 10, 64 << 10  # bytes of a step's output that are kept, of its beginning and of its end
SHOWN = 1500  # characters of the tail that go into the results
LOOK = 0.2  # seconds between looks at a step
OUT_OF_MEMORY = ("OutOfMemoryError", "CUDA out of memory", "MemoryError", "CUBLAS_STATUS_ALLOC_FAILED")


@dataclass(frozen=True)
class Step:
    """A process to be run.

    Attributes:
        what: it shows, in a few words.
        command: of the process; it reads a line before it begins, if it is ``gated``.
        limit: seconds after which it hangs.
        least: seconds that must be left for it to be begun.
    """

    name: str
    what: str
    command: Sequence[str]
    limit: float
    least: float = 5
    gated: bool = False


@dataclass
class Outcome:
    """What became of a step, in one word and one sentence."""

    step: str
    what: str
    word: str
    seconds: float = 0.0
    why: str = ""


class Ended(Exception):
    """The harness itself was told to end."""


class Running:
    """A step's process, and the head and the tail of what it says."""

    def __init__(self, step: Step, environment: Mapping[str, str]) -> None:
        self.step = step
        self.process = subprocess.Popen(
            step.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )
        self._head, self._tail, self._length = bytearray(), deque[bytes](), 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        kept = 0
        with contextlib.suppress(OSError, ValueError):
            while data := os.read(self.process.stdout.fileno(), 1 << 16):
                self._length += len(data)
                room = HEAD - len(self._head)
                self._head += data[:room]
                if rest := data[room:]:
                    self._tail.append(rest)
                    kept += len(rest)
                    while kept - len(self._tail[0]) >= TAIL:
                        kept -= len(self._tail.popleft())

    def begin(self) -> None:
        """Open the gate."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it died before
            self.process.stdin.write(b"go\n")
            self.process.stdin.flush()
            self.process.stdin.close()

    def output(self) -> str:
        """What it said, with a line where the middle is left out."""
        self._reader.join(timeout=1)  # somebody may still hold the other end
        tail = b"".join(self._tail)[-TAIL:]
        left_out = self._length - len(self._head) - len(tail)
        middle = f"\n[... {left_out} bytes left out ...]\n".encode() if left_out > 0 else b""
        return (bytes(self._head) + middle + tail).decode(errors="replace")

    def say_where(self) -> None:
        """Have it print where it is, if it is one of ours."""
        with contextlib.suppress(OSError):
            self.process.send_signal(signal.SIGUSR1)
            time.sleep(0.5)

    def end_group(self) -> None:
        """Kill who is left of its session, also where orphans cannot be adopted."""
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> bool:
        """Kill it and all it started; whether it is gone."""
        others = [each for each in processes.family(self.process.pid) if each != self.process.pid]
        self.process.kill()
        self.end_group()
        processes.kill(others)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)
        return self.process.returncode is not None


@dataclass
class Harness:
    """Runs the steps and keeps everything in ``out``.

    Attributes:
        deadline: of all, on the clock of ``time.monotonic``.
        ahead: processes that are started before their turn.
        host_memory: bytes a step may have.
        summarise: makes the summary's text of the outcomes and the results; written after every step.
    """

    steps: Sequence[Step]
    out: Path
    deadline: float
    summarise: Callable[[Sequence[Outcome], Sequence[dict[str, Any]]], str]
    host_memory: int
    ahead: int = 0
    on_cpu: bool = False
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.results, self.log = self.out / "results.jsonl", self.out / "steps.log"
        self._started: dict[str, Running] = {}
        self._current: tuple[Step, float] | None = None

    def run(self) -> bool:
        """All steps; whether the harness came to their end by itself."""
        processes.adopt_orphans()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _raise)
        waiting = list(self.steps)
        try:
            while waiting:
                step = waiting.pop(0)
                self._start_ahead(step, waiting)
                self._one(step)
            return True
        except Ended as ended:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            if self._current is not None:
                cut, began = self._current
                self._note(Outcome(cut.name, cut.what, HUNG, time.monotonic() - began, f"cut off: {ended}"))
            for step in waiting:
                self._note(Outcome(step.name, step.what, DROPPED, why=str(ended)))
            return False
        finally:
            processes.kill([each for each in processes.family(os.getpid()) if each != os.getpid()])
            self._write_summary()

    def _start_ahead(self, step: Step, later: Sequence[Step]) -> None:
        for each in [step, *[other for other in later if other.gated][: self.ahead]]:
            if each.name not in self._started and self._left() >= each.least:
                self._started[each.name] = Running(each, self.environment)

    def _left(self) -> float:
        return self.deadline - time.monotonic()

    def _one(self, step: Step) -> None:
        running = self._started.pop(step.name, None)
        if running is None or self._left() < step.least:
            if running is not None:
                running.end()
            words = f"{max(self._left(), 0):.0f} s were left, and it wants {step.least:g}"
            self._note(Outcome(step.name, step.what, DROPPED, why=words))
            return
        limit = min(step.limit, self._left())
        began = time.monotonic()
        self._current = step, began
        record.append(self.results, {"step": step.name, "event": "begin", "limit": round(limit, 1)})
        try:
            running.begin()
            cut = self._watch(running, limit)
        except Ended:
            running.end()
            self._keep_log(running, "cut off")
            raise
        seconds = time.monotonic() - began
        known = [other.process.pid for other in self._started.values()]
        word, why = self._judge(running, cut)
        # What it left behind would take memory from the next.
        running.end_group()
        processes.kill([each for each in processes.family(os.getpid(), known) if each != os.getpid()])
        self._keep_log(running, f"{word} after {seconds:.1f} s {why}".rstrip())
        self._current = None
        self._note(Outcome(step.name, step.what, word, seconds, why))

    def _watch(self, running: Running, limit: float) -> tuple[str, str] | None:
        """Waits until its end; what it was ended as and why, None if it ended by itself."""
        began = time.monotonic()
        while running.process.poll() is None:
            if time.monotonic() - began > limit:
                running.say_where()
                gone = running.end()
                return HUNG, f"no end after {limit:.0f} s" + ("" if gone else ", and it cannot be killed")
            held = processes.memory_of(processes.family(running.process.pid))
            if held > self.host_memory:
                running.end()
                return FULL, f"{held / 2**30:.1f} GiB of the host's memory, {self.host_memory / 2**30:.1f} may be had"
            time.sleep(LOOK)
        return None

    def _judge(self, running: Running, cut: tuple[str, str] | None) -> tuple[str, str]:
        if cut is not None:
            return cut
        code, tail = running.process.returncode, running.output()[-20_000:]
        if code:
            how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            last = next((line.strip() for line in reversed(tail.splitlines()) if line.strip()), "")
            full = next((word for word in OUT_OF_MEMORY if word in tail), None)
            return (FULL if full else DIED), f"{how}: {last[:160]}" if last else how
        lines = [line for line in record.read(self.results) if line["step"] == running.step.name]
        stops = {line["event"]: line["why"] for line in lines if line["event"] in ("stops", "absent")}
        checks = [line for line in lines if line["event"] == "check"]
        off = [check for check in checks if not check["ok"]]
        if off:
            return OFF, f"{len(off)} of {len(checks)} checks"
        if "absent" in stops:
            return ABSENT, stops["absent"]
        if "stops" in stops:
            return UP_TO, stops["stops"]
        if not checks:
            return OFF, "it ended without a check"
        return (REHEARSED if self.on_cpu else OK), f"{len(checks)} checks"

    def _keep_log(self, running: Running, title: str) -> None:
        with self.log.open("a") as log:
            log.write(f"===== {running.step.name}: {title}\n{running.output()}\n")
            log.flush()
            os.fsync(log.fileno())

    def _note(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        tail = {}
        if outcome.word in (DIED, HUNG, FULL) and self.log.exists():
            tail = {"tail": self.log.read_text(errors="replace")[-SHOWN:]}
        line = {"event": "end", "outcome": outcome.word, "seconds": round(outcome.seconds, 1), "why": outcome.why}
        record.append(self.results, {"step": outcome.step, **line, **tail})
        print(f"{outcome.step}: {outcome.word}, {outcome.seconds:.1f} s {outcome.why}", file=sys.stderr, flush=True)
        self._write_summary()

    def _write_summary(self) -> None:
        unfinished = self.out / ".summary.txt"
        unfinished.write_text(self.summarise(self.outcomes, record.read(self.results)))
        unfinished.replace(self.out / "summary.txt")


def _raise(number: int, _: Any) -> None:
    raise Ended(signal.Signals(number).name)
