"""One long run under random faults, compared with the same run left alone.

    python -m slurm.testbed.soak [faults=40] [seed=0] [minutes=N] [directory=DIR] [data=data/digits]

Prints every fault and, at the end, what was lost and whether losses and samples are equal. Faults end after
``minutes``, or on Ctrl-C or SIGTERM; what was trained until then is compared all the same. Another call with the same
directory and another seed adds to the record there (``faults.jsonl``), and the figures at the end are those of the
whole record.
"""

from __future__ import annotations

import json
import math
import random
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm.testbed.bed import TestBed, cut_newest_checkpoint, is_saving, last_step, losses, samples

EVERY = 3  # steps between checkpoints
STEPS_PER_FAULT = 4  # at most, between two faults
RANK_FAULTS = ("kill", "kill while saving", "kill and cut", "hang")
KINDS = ("preempt", "signal", "signal twice", *RANK_FAULTS, "node crash", "node hang")
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
RECORD = "faults.jsonl"
PATIENCE = 900  # seconds


class Soak:
    def __init__(self, directory: Path, data: str, faults: int, seed: int, minutes: float) -> None:
        self.record = directory / RECORD
        self.directory = directory / f"seed{seed}"
        self.bed = TestBed(self.directory / "slurm", nodes=4)
        self.data, self.faults, self.seed = data, faults, seed
        self.deadline = time.monotonic() + 60 * minutes
        self.steps = EVERY + faults * STEPS_PER_FAULT
        self.random = random.Random(seed)
        self.down: str | None = None  # a node that crashed or hangs

    def run(self) -> bool:
        """Whether the disturbed run has the losses and the samples of the quiet one."""
        disturbed = self.directory / "disturbed"
        self.bed.start()
        try:
            (job,) = self.bed.submit(*self.words(disturbed))
            self.break_things(job, disturbed)
            self.heal()
            return self.compare(job, disturbed)
        finally:
            self.bed.stop()

    def compare(self, job: str, disturbed: Path) -> bool:
        """Both runs up to the first checkpoint behind the last fault."""
        step, quiet = min(last_step(disturbed) + EVERY, self.steps), self.directory / "quiet"
        self.train_to(step, job, disturbed)
        (other,) = self.bed.submit(*self.words(quiet))
        self.train_to(step, other, quiet)
        found, expected = losses(disturbed), losses(quiet)
        steps = sorted(found.keys() & expected.keys())
        trained, wanted = samples(disturbed), samples(quiet)
        equal = steps == list(range(1, len(steps) + 1)) and all(
            found[each] == expected[each] and trained[each] == wanted[each] for each in steps
        )
        verdict = "equal" if equal else "NOT EQUAL"
        print(f"seed {self.seed}: {self.restarts(job)} restarts, the job is {self.bed.state(job)}")
        print(f"the losses and samples of {len(steps)} steps are {verdict} to the quiet run's", flush=True)
        return equal and len(steps) >= step

    def train_to(self, step: int, job: str, run: Path) -> None:
        if self.wait_until(lambda: last_step(run) >= step, job):
            self.bed.command("scancel", job)
            self.bed.wait_for_state(job, *OVER)

    def words(self, output: Path) -> list[str]:
        return [
            "experiment=digits_tiny", "cluster=slurm_testbed", "parallel=dp2", "platform=cpu", "trainer.log_every=1",
            f"output_dir={output}", f"data.path={self.data}", f"seed={self.seed}", "cluster.max_failures=20",
            "cluster.time_limit=1-00:00:00", "model.language.num_layers=2", "model.vision.num_layers=2",
            f"trainer.max_steps={self.steps}", f"trainer.checkpoint_every={EVERY}", "trainer.val_samples=0",
            "trainer.global_batch_size=32", "trainer.micro_batch_size=4", "trainer.hang_timeout=20",
            "data.record_samples=true",
        ]  # fmt: skip

    def break_things(self, job: str, run: Path) -> None:
        for ending in (signal.SIGINT, signal.SIGTERM):
            signal.signal(ending, signal.default_int_handler)
        number = 0
        try:
            while number < self.faults and time.monotonic() < self.deadline and self.one_fault(job, run, number + 1):
                number += 1
        except KeyboardInterrupt:
            print("no more faults", flush=True)

    def one_fault(self, job: str, run: Path, number: int) -> bool:
        """Wait until the job has trained a little, break something, and wait until it trains again; False when the job
        is over."""
        wanted = last_step(run) + self.random.randint(1, STEPS_PER_FAULT)
        kind, rank = self.random.choice(KINDS), self.random.randint(0, 1)
        if not self.wait_until(lambda: last_step(run) >= wanted, job):
            return False
        self.heal()
        if kind == "kill while saving" and not self.wait_until(lambda: is_saving(run), job, every=0.005):
            return False
        restarts, begin = self.restarts(job), time.monotonic()
        self.break_it(kind, job, run, rank)
        print(f"{time.strftime('%X')} fault {number}: {kind} (rank {rank}) at step {last_step(run)}", flush=True)
        if not self.wait_until(lambda: self.restarts(job) > restarts, job):
            return False
        reached = last_step(run)
        if not self.wait_until(lambda: self.resumed_at(job, run) >= 0, job):
            return False
        seconds = round(time.monotonic() - begin, 1)
        fault = {"seed": self.seed, "kind": kind, "step": reached, "resumed_at": self.resumed_at(job, run)}
        with self.record.open("a") as file:
            file.write(json.dumps({**fault, "seconds": seconds}) + "\n")
        return True

    def wait_until(self, condition: Callable[[], bool], job: str, every: float = 0.2) -> bool:
        """False when the job is over before that."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if self.bed.state(job) in OVER:
                return False
            assert time.monotonic() < deadline, (
                f"nothing has happened for {PATIENCE} s to the job, {self.bed.state(job)}"
            )
            time.sleep(every)
        return True

    def break_it(self, kind: str, job: str, run: Path, rank: int) -> None:
        if kind == "preempt":
            self.bed.command("sbatch", "-p", "urgent", "-N4", "--exclusive", "-o", "/dev/null", "--wrap", "true")
        elif kind.startswith("signal"):
            for _ in range(2 if kind == "signal twice" else 1):
                self.bed.signal_batch_script(job)
        elif kind.startswith("node"):
            self.down = self.bed.node_of(job, rank)
            self.bed.fault(self.down, kind.removeprefix("node "))
        else:
            self.bed.signal_rank(job, rank, signal.SIGSTOP if kind == "hang" else signal.SIGKILL)
            if kind == "kill and cut" and len(list((run / "checkpoints").glob("step=*"))) > 1:
                cut_newest_checkpoint(run)

    def heal(self) -> None:
        if self.down:
            self.bed.fault(self.down, "back")
            self.down = None

    def restarts(self, job: str) -> int:
        return int(self.bed.shown(job, "Restarts"))

    def resumed_at(self, job: str, run: Path) -> int:
        """The step from which the newest start trains; -1 as long as it does not."""
        log = run / "slurm" / f"{job}.{self.restarts(job)}.log"
        text = log.read_text(errors="replace") if log.exists() else ""
        _, found, rest = text.partition("training from step ")
        return int(rest.split()[0]) if found else -1


def figures(record: Path) -> str:
    """Of all faults on record, by kind: how many, steps done again, seconds until training went on."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in record.read_text().splitlines() if record.exists() else []:
        kinds[json.loads(line)["kind"]].append(json.loads(line))
    rows = [f"{'fault':20}{'number':>8}{'steps again, most':>20}{'in all':>8}{'seconds, median':>18}"]
    for kind, faults in [*sorted(kinds.items()), ("all", [fault for each in kinds.values() for fault in each])]:
        again = [fault["step"] - fault["resumed_at"] for fault in faults] or [0]
        seconds = sorted(fault["seconds"] for fault in faults) or [math.nan]
        median = seconds[len(seconds) // 2]
        rows.append(f"{kind:20}{len(faults):8}{max(again):20}{sum(again):8}{median:18.0f}")
    return "\n".join(rows)


def main(words: list[str]) -> int:
    given = dict(word.partition("=")[::2] for word in words)
    if given.keys() - {"faults", "seed", "minutes", "directory", "data"}:
        sys.exit(__doc__)
    directory = Path(given.get("directory") or tempfile.mkdtemp(prefix="nemo-pre-soak-"))
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o755)  # munge refuses a closed folder
    print(f"in {directory}", flush=True)
    data = str(Path(given.get("data", "data/digits")).resolve())
    minutes = float(given.get("minutes", "inf"))
    try:
        well = Soak(directory, data, int(given.get("faults", 40)), int(given.get("seed", 0)), minutes).run()
    finally:
        print(figures(directory / RECORD), flush=True)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
