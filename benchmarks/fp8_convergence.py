"""Does FP8 learn what bf16 learns? The demo's runs in every precision, from the same weights and data.

    python -m benchmarks.fp8_convergence --steps 400                 # bf16 and the FP8 recipes, on a GPU
    python -m benchmarks.fp8_convergence --steps 20 --platform cpu   # bf16 and float32

Two bf16 runs with other seeds of the data order give the band: how far apart equally good runs are. A run is given as
the mean of each quantity over the last quarter of its steps and its distance to the first bf16 run's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
FP8 = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")
QUANTITIES = ("lm/loss", "pre/cosine", "laver/mim", "laver/gram")
EXPERIMENTS = ("digits_tiny_pre", "digits-laver")
SHAPE = ["data.sequence_length=96", "trainer.log_every=1", "trainer.val_samples=0", "parallel=single"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss curves of FP8 against bf16.")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--platform", default="gpu", choices=("gpu", "cpu"))
    parser.add_argument("--data", default="data/digits", help="made by nemo-pre data demo")
    arguments = parser.parse_args()
    others = FP8 if arguments.platform == "gpu" else ("fp32",)
    result: dict[str, Any] = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "settings": vars(arguments),
        "experiments": {},
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"fp8_convergence_{arguments.platform}.json"
    with tempfile.TemporaryDirectory(prefix="fp8-") as scratch:
        for experiment in EXPERIMENTS:
            runs = {"bf16": ["precision=bf16"], "bf16, other data order": ["precision=bf16", "data.shuffle_seed=1"]}
            runs |= {name: [f"precision={name}"] for name in others}
            # Nothing is timed, and the runs are so small that a GPU has room for all: side by side there.
            with ThreadPoolExecutor(len(runs) if arguments.platform == "gpu" else 1) as pool:
                jobs = {
                    name: pool.submit(train, Path(scratch) / f"{experiment}-{number}", experiment, words, arguments)
                    for number, (name, words) in enumerate(runs.items())
                }
                curves = {name: job.result() for name, job in jobs.items()}
            result["experiments"][experiment] = {"ends": ends(curves), "curves": curves}
            out.write_text(json.dumps(result) + "\n")  # what is done is not lost to a time limit
    print(json.dumps({name: found["ends"] for name, found in result["experiments"].items()}, indent=1))
    print(f"written to {out}")


def train(output: Path, experiment: str, words: list[str], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Every step's quantities; LaVer's first step masks nothing and has no loss of that."""
    command = [sys.executable, "-m", "nemo_pre.cli", "train", f"experiment={experiment}", *SHAPE, *words]
    command += [f"output_dir={output}", f"data.path={Path(arguments.data).resolve()}"]
    command += [f"platform={arguments.platform}", f"trainer.max_steps={arguments.steps}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "lm/loss" in row]
    found = {name: [row[name] for row in steps if name in row] for name in QUANTITIES}
    return {name: values for name, values in found.items() if values}


def ends(curves: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, Any]]:
    def end(name: str, quantity: str) -> float:
        values = curves[name][quantity]
        return statistics.fmean(values[-max(1, len(values) // 4) :])

    return {
        quantity: {
            name: {"end": round(end(name, quantity), 5), "from_bf16": round(end(name, quantity) - of_bf16, 5)}
            for name in curves
        }
        for quantity in curves["bf16"]
        for of_bf16 in [end("bf16", quantity)]
    }


if __name__ == "__main__":
    main()
