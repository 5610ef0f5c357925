"""LaVer's loss ablation on digit scenes: does MIM alone homogenise visual tokens, and do the Gram terms prevent it?

    python -m benchmarks.laver_digits                  # arms of 600 steps, a few at a time, then table and plots
    python -m benchmarks.laver_digits --steps 200 --seeds 1 2 3

Two ways: from random weights, encoder trained; and as the paper trains, from a first stage (here the run with mixed
attention and 2D-RoPE) on with the encoder frozen. Each arm is a run of ``nemo-pre train``; a finished one is not
repeated. Results go to ``benchmarks/results/`` as JSON and PNG: exact match, losses, and the mean cosine between an
image's visual tokens layer by layer over training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SPATIAL = ["model.attention=mixed", "model.rope=2d"]
LOSSES = {
    "MIM + CGA": ["experiment=digits-laver"],
    "MIM + GA": ["experiment=digits-laver", "objective.laver.gram_clipped=false"],
    "MIM": ["experiment=digits-laver", "objective.laver.gram_weight=0"],
    "mixed attention + 2D-RoPE": ["experiment=digits_tiny", *SPATIAL],
}
FIRST_STAGE = "mixed attention + 2D-RoPE"
WAYS = {
    "scratch": {**LOSSES, "baseline": ["experiment=digits_tiny"]},
    "second_stage": {
        arm: [*overrides, "optim.freeze_vision=true", "optim.lr=5e-4"] for arm, overrides in LOSSES.items()
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description="LaVer's loss ablation on digit scenes.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1234])
    parser.add_argument("--runs", type=Path, default=Path("runs/laver_digits"))
    parser.add_argument("--at-a-time", type=int, default=max(1, (os.cpu_count() or 2)))
    arguments = parser.parse_args()
    RESULTS.mkdir(exist_ok=True)
    results: dict[str, Any] = {}
    for way, arms in WAYS.items():  # the second starts from runs of the first
        jobs = [(way, arm, seed) for seed in arguments.seeds for arm in arms]
        with ThreadPoolExecutor(arguments.at_a_time) as pool:
            list(pool.map(lambda job: train(*job, arguments.steps, arguments.runs), jobs))
        results[way] = {
            arm: [measured(directory(arguments.runs, way, arm, seed)) for seed in arguments.seeds] for arm in arms
        }
        plot(results[way], RESULTS / f"laver_digits_{way}_cpu.png")
        print(f"{way}\n{table(results[way])}", flush=True)
    out = RESULTS / "laver_digits_cpu.json"
    out.write_text(json.dumps({**provenance(arguments), "ways": results}) + "\n")
    print(f"written to {out}")


def directory(runs: Path, way: str, arm: str, seed: int) -> Path:
    return runs / way / f"{arm.replace(' ', '_').replace('+', 'and')}_{seed}"


def train(way: str, arm: str, seed: int, steps: int, runs: Path) -> None:
    output = directory(runs, way, arm, seed)
    if (output / "checkpoints" / f"step={steps}").is_dir():
        return
    overrides = [
        *WAYS[way][arm],
        f"output_dir={output}",
        f"seed={seed}",
        f"data.shuffle_seed={seed}",
        f"trainer.max_steps={steps}",
        "trainer.log_every=20",
        "trainer.log_similarity_every=20",
        "trainer.val_samples=256",
        "platform=cpu",
        "resume=false",
    ]
    if way == "second_stage":
        overrides.append(f"init_from={directory(runs, 'scratch', FIRST_STAGE, seed)}/checkpoints")
    print(f"{way}, {arm}, seed {seed}: {output}", flush=True)
    output.mkdir(parents=True, exist_ok=True)
    with (output / "log.txt").open("w") as log:
        command = [str(Path(sys.executable).parent / "nemo-pre"), "train", *overrides]
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)


def measured(run: Path) -> dict[str, Any]:
    """A run's exact match and losses at its end, and curves of similarity by layer."""
    by_step: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        by_step.setdefault(entry["step"], {}).update(entry)
    steps = sorted(by_step)
    layers = sorted({int(n.rsplit("_", 1)[1]) for s in steps for n in by_step[s] if n.startswith("similarity/")})
    recorded = [step for step in steps if "similarity/layer_0" in by_step[step]]
    last = by_step[steps[-1]]
    return {
        "steps": recorded,
        "similarity": {
            layer: [round(by_step[step][f"similarity/layer_{layer}"], 4) for step in recorded] for layer in layers
        },
        "lm_loss": [[step, round(by_step[step]["lm/loss"], 4)] for step in steps if "lm/loss" in by_step[step]],
        "last": {name: round(value, 4) for name, value in last.items() if name.startswith(("val/", "laver/", "lm/"))},
    }


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": {"gpu": None, "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("torch", "megatron-core", "nemo_toolkit")},
        "settings": {"steps": arguments.steps, "seeds": arguments.seeds, "ways": WAYS},
    }


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    rows = [f"{'arm':28} {'val loss':>9} {'exact':>7} {'similarity: layer 0':>20} {'middle':>8} {'last':>8}"]
    for arm, seeds in results.items():
        layers = sorted(seeds[0]["similarity"], key=int)
        for run in seeds:
            first, middle, last = (run["similarity"][layers[i]][-1] for i in (0, len(layers) // 2, -1))
            end = run["last"]
            answers = f"{end['val/lm_loss']:9.4f} {end['val/exact_match']:7.1%}"
            rows.append(f"{arm:28} {answers} {first:20.3f} {middle:8.3f} {last:8.3f}")
    return "\n".join(rows)


def plot(results: dict[str, list[dict[str, Any]]], out: Path) -> None:
    """A panel per arm: similarity over training, a line per layer; the first seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(results), figsize=(3.2 * len(results), 3.2), sharey=True)
    for axis, (arm, seeds) in zip(axes, results.items(), strict=True):
        run = seeds[0]
        layers = sorted(run["similarity"], key=int)
        for number, layer in enumerate(layers):
            colour = pyplot.get_cmap("viridis")(number / (len(layers) - 1))
            axis.plot(run["steps"], run["similarity"][layer], color=colour, linewidth=1.3, label=f"layer {layer}")
        axis.set_title(arm, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(-0.05, 1.02)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean cosine of visual tokens")
    axes[-1].legend(fontsize=7, frameon=False, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
