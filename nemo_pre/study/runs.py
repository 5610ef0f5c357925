"""One run of a study: trained, then diagnosed, each by a process of its own; what is finished is not repeated.

A run's directory says by ``options.json`` what it was started with, by ``trained.json`` and ``diagnosed.json`` that
these were finished. A run that was killed is started again with the same options and resumes from its checkpoint. It
may be diagnosed at several of its steps; one with a model of its own trains nothing and diagnoses that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_pre.launch.leash import leashed

OPTIONS, TRAINED, DIAGNOSED, LOG = "options.json", "trained.json", "diagnosed.json", "log.txt"
DIAGNOSTICS, CHECKPOINTS = "diagnostics", "checkpoints"


class RunFailed(RuntimeError):
    """The message is one sentence."""


@dataclass(frozen=True)
class StudyRun:
    """One run, or one model.

    Attributes:
        overrides: of ``nemo-pre train`` but for the directory.
        cost: of a step, in steps of the cheapest arm.
        diagnose: options of ``nemo-pre diagnose``.
        measured: steps whose checkpoints are diagnosed; empty: only the newest.
        model: diagnosed as it is, without a training; None: the run's own.
        keeps_weights: whether its checkpoints stay when it is finished.
    """

    arm: str
    seed: int
    directory: Path
    overrides: tuple[str, ...]
    steps: int
    cost: float
    data: str
    diagnose: tuple[str, ...]
    measured: tuple[int, ...] = ()
    model: Path | None = None
    keeps_weights: bool = True

    @property
    def name(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def is_finished(self) -> bool:
        return self.is_trained and _read(self.directory / DIAGNOSED) == {"options": list(self.diagnose)}

    @property
    def is_trained(self) -> bool:
        if self.model is not None:
            return True
        found = _read(self.directory / TRAINED)
        return found is not None and found["options"] == list(self.overrides)

    @property
    def steps_done(self) -> int:
        """Read off its metrics, while another process trains."""
        from nemo_pre.run_files.metrics import METRICS, read_metrics

        if self.is_trained:
            return self.steps
        file = self.directory / METRICS
        return max((int(line["step"]) for line in read_metrics(file)), default=0) if file.is_file() else 0

    @property
    def phase(self) -> str:
        """What the run's process is at, in a few words."""
        return "diagnosing" if self.is_trained else f"{self.steps_done}/{self.steps}"

    def check(self) -> None:
        """Refuse a directory that holds a run with other options.

        Raises:
            ValueError: the directory holds a run with other options.
        """
        held = _read(self.directory / OPTIONS)
        if held is not None and held["options"] != list(self.overrides):
            differ = sorted({*held["options"]} ^ {*self.overrides})
            raise ValueError(
                f"{self.directory} holds a run with other options ({', '.join(differ)}): remove it, or give another "
                f"runs=DIRECTORY."
            )

    def do(self, environment: dict[str, str]) -> None:
        """Train and diagnose, what of it is not finished.

        Raises:
            RunFailed: a process ended with an error.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        _write(self.directory / OPTIONS, {"options": list(self.overrides)})
        if not self.is_trained:
            for place in (self.directory, *self.diagnosed_at().values()):
                (place / DIAGNOSED).unlink(missing_ok=True)  # of other weights
            started = time.monotonic()
            self._process("train", [*self.overrides, f"output_dir={self.directory}"], environment)
            seconds = round(time.monotonic() - started, 1)
            _write(self.directory / TRAINED, {"options": list(self.overrides), "seconds": seconds})
        if not self.is_finished:
            for model, out in self._diagnoses():
                if not self.measured or _read(out / DIAGNOSED) != {"options": list(self.diagnose)}:
                    where = [str(model), self.data, str(out)]
                    self._process("diagnose", [*where, *self.diagnose, f"title={self.arm}"], environment)
                    if self.measured:
                        _write(out / DIAGNOSED, {"options": list(self.diagnose)})
            _write(self.directory / DIAGNOSED, {"options": list(self.diagnose)})
        if not self.keeps_weights:
            shutil.rmtree(self.directory / CHECKPOINTS, ignore_errors=True)

    def diagnosed_at(self) -> dict[int, Path]:
        """Where the results of each diagnosed step lie."""
        if not self.measured:
            return {self.steps: self.directory / DIAGNOSTICS}
        return {step: self.directory / f"{DIAGNOSTICS}-{step}" for step in self.measured}

    def _diagnoses(self) -> list[tuple[Path, Path]]:
        """(model, results) of each."""
        found = self.diagnosed_at()
        if not self.measured:
            return [(self.model or self.directory, found[self.steps])]
        return [(self.directory / CHECKPOINTS / f"step={step}", out) for step, out in found.items()]

    def _process(self, verb: str, words: Sequence[str], environment: dict[str, str]) -> None:
        run_verb(verb, words, self.name, self.directory / LOG, environment)


def run_verb(verb: str, words: Sequence[str], name: str, log: Path, environment: dict[str, str]) -> None:
    """``nemo-pre VERB WORDS`` as a process of its own, which writes to ``log``.

    Raises:
        RunFailed: it ended with an error; ``name`` says whose it was.
    """
    command = [sys.executable, "-m", "nemo_pre.cli", *verb.split(), *words]
    variables = {**os.environ, **environment}
    with log.open("a") as file:
        file.write(f"nemo-pre {verb} {' '.join(words)}\n")
        file.flush()
        code = subprocess.run(
            leashed(command), stdout=file, stderr=subprocess.STDOUT, env=variables, close_fds=False, check=False
        ).returncode
    if code:
        last = next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")
        raise RunFailed(f"{name}: nemo-pre {verb} ended with code {code} ({last.strip()}); see {log}.")


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, content: Any) -> None:
    """Written beside and renamed, so that a kill leaves no half of a marker."""
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(beside, path)
