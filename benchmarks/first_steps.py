"""The first steps of the demo and of LaVer's digits run, number by number, so that a change of numerics is seen.

    python -m benchmarks.first_steps [STEPS]      # 50 of each, on what the machine has

It writes ``benchmarks/results/first_steps_{cpu,gpu}.json``, which is committed. ``tests/training/test_first_steps.py``
goes the first of them and compares: who means to change a number writes the file anew and says so in the change.

The runs are the recipes', on one rank in float32 and on a smaller set of scenes, with the schedules of all their
steps. LaVer masks the whole ratio from the first step on, which its own schedule would reach at the last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.overhead import RESULTS, describe_machine, versions
from nemo_pre.config.compose import compose_run
from nemo_pre.config.run import RunConfig

STEPS = 50
DATA = {"num_scenes": 400, "seed": 3, "val_fraction": 0.2, "scenes_per_shard": 64}
ONE_RANK = ["parallel=single", "data.num_workers=0"]
RUNS = {
    "demo": ["experiment=digits_tiny_pre", *ONE_RANK],
    "laver": ["experiment=digits-laver", "objective.laver.mask_schedule=constant", *ONE_RANK],
}
QUANTITIES = ("lm/loss", "pre/cosine", "laver/mim", "laver/gram", "grad_norm")
DIGITS = 8  # significant ones that are written: float32 has seven or eight
WRITTEN = "first_steps.json"

Curves = dict[str, list[float]]


def run_of(name: str, data: str | Path, output: str | Path, *more: str) -> RunConfig:
    """Configuration of one of :data:`RUNS` on the data in ``data``."""
    return compose_run([*RUNS[name], f"data.path={data}", f"output_dir={output}", *more])


def first_steps(config: RunConfig, steps: int) -> tuple[Curves, bool]:
    """What each of the run's first ``steps`` steps logs, and whether it ran on a GPU: on a rank. Nothing is saved."""
    from lightning.pytorch.callbacks import Callback

    from nemo_pre.callbacks.progress import logged_metrics
    from nemo_pre.nemo.data import build_data_module
    from nemo_pre.train import build_model, build_trainer, objective_callbacks, prepare_process

    on_gpu = prepare_process(config)
    curves: Curves = {}

    class Follow(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logged = logged_metrics(trainer)
            for name in QUANTITIES:
                if name in logged:
                    curves.setdefault(name, []).append(float(f"{logged[name]:.{DIGITS}g}"))
            trainer.should_stop = trainer.global_step >= steps  # the schedules are those of all the run's steps

    trainer = build_trainer(config, on_gpu, callbacks=[*objective_callbacks(config), Follow()])
    trainer.fit(build_model(config, on_gpu), build_data_module(config))
    return curves, on_gpu


def write_first_steps(config: RunConfig) -> None:
    """Write :func:`first_steps` into the run's directory, as ``launch`` starts it."""
    steps = int((Path(config.output_dir) / "steps").read_text())
    curves, on_gpu = first_steps(config, steps)
    (Path(config.output_dir) / WRITTEN).write_text(json.dumps({"curves": curves, "machine": describe_machine(on_gpu)}))


def main() -> None:
    from data_prep.digits import prepare
    from nemo_pre.launch.ranks import launch

    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="first-steps-") as scratch:
        prepare(Path(scratch) / "digits", workers=1, **DATA)
        for name in RUNS:
            output = Path(scratch) / name
            output.mkdir()
            (output / "steps").write_text(str(steps))
            launch(run_of(name, Path(scratch) / "digits", output), "benchmarks.first_steps:write_first_steps")
            found[name] = json.loads((output / WRITTEN).read_text())
    machine = found["demo"]["machine"]
    result = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": machine,
        "versions": versions(),
        "data": DATA,
        "runs": {name: {"words": RUNS[name], "steps": of["curves"]} for name, of in found.items()},
    }
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"first_steps_{'gpu' if machine['gpu'] else 'cpu'}.json"
    out.write_text(json.dumps(result) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
