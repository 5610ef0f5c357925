"""What diagnostics during training cost: the time of a record beside that of a step.

    python -m benchmarks.diagnostics_overhead                                    # the toy on this machine
    python -m benchmarks.diagnostics_overhead --note "shared machine" parallel=pp2

One run of the product with ``trainer.log_diagnostics_every``: a step's time is the median over steps, a record's that
of ``diagnostics/seconds``, both from the run's own metrics, so that they share whatever else the machine does. The
overhead at an interval is their ratio over the interval. Written to ``benchmarks/results``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.overhead import describe_machine

RESULTS = Path(__file__).parent / "results"
INTERVALS = (100, 500, 1000)
WARM_UP = 5  # steps


@dataclass(frozen=True)
class Settings:
    """``overrides`` of ``nemo-pre train experiment=EXPERIMENT``; a record every ``every`` steps."""

    experiment: str
    steps: int
    every: int
    overrides: list[str] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description="Overhead of diagnostics during training.")
    parser.add_argument("overrides", nargs="*", help="of nemo-pre train")
    parser.add_argument("--experiment", default="digits_tiny")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--note", default="")
    given = parser.parse_args()
    settings = Settings(given.experiment, given.steps, given.every, given.overrides)
    with tempfile.TemporaryDirectory() as scratch:
        lines = recorded(settings, Path(scratch) / "run")
    result = {**summary(settings, lines), "note": given.note}
    RESULTS.mkdir(exist_ok=True)
    device = "gpu" if result["machine"]["gpu"] else "cpu"
    out = RESULTS / f"diagnostics_overhead_{settings.experiment}_{device}.json"
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("step_seconds", "record_seconds", "overhead")}, indent=1))
    print(f"written to {out}")


def recorded(settings: Settings, output: Path) -> list[dict[str, Any]]:
    """The run's metrics."""
    options = [
        f"experiment={settings.experiment}",
        f"output_dir={output}",
        f"trainer.max_steps={settings.steps}",
        f"trainer.log_diagnostics_every={settings.every}",
        "trainer.log_every=1",
        "trainer.val_samples=0",
        *settings.overrides,
    ]
    subprocess.run([sys.executable, "-m", "nemo_pre.cli", "train", *options], check=True)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def summary(settings: Settings, lines: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    steps = [line["step_time"] for line in lines if "step_time" in line and line["step"] > WARM_UP]
    records = [line["diagnostics/seconds"] for line in lines if "diagnostics/seconds" in line][1:]
    step, record = statistics.median(steps), statistics.median(records)
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": describe_machine(torch.cuda.is_available()),
        "versions": {name: version(name) for name in ("torch", "megatron-core", "nemo_toolkit", "lightning")},
        "settings": asdict(settings),
        "step_seconds": round(step, 4),
        "record_seconds": round(record, 4),
        "record_in_steps": round(record / step, 2),
        "overhead": {str(every): round(record / step / every, 5) for every in INTERVALS},
        "interval_for_one_percent": math.ceil(100 * record / step),
        "step_seconds_all": [round(seconds, 4) for seconds in steps],
        "record_seconds_all": [round(seconds, 4) for seconds in records],
    }


if __name__ == "__main__":
    main()
