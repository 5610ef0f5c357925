"""The product's own runs: the demo's first steps against the CPU's, and what PRe and LaVer cost at 7B width."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.gpu.first_contact.machine import data_sheet
from benchmarks.gpu.first_contact.record import Record

STEPS = 5
EXPERIMENTS = {
    "PRe": ["experiment=digits_tiny_pre"],
    # All that is ever masked, from the first step on: a mean over the first step's one or two tokens says little.
    "LaVer": ["experiment=digits-laver", "objective.laver.mask_schedule=constant"],
}
SHAPE = (
    "data.sequence_length=96",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.log_every=1",
    "trainer.val_samples=0",
    "optim.lr=1e-4",
    "optim.warmup_ratio=0",
    "parallel=single",
)
QUANTITIES = ("lm/loss", "pre/cosine", "laver/mim", "laver/gram", "grad_norm")
WITHIN = {"fp32": 2e-3, "bf16": 3e-2}
OF_LAVER = 4  # it divides logits by a temperature of 0.04 before it compares, and their errors with them


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def digits(record: Record) -> None:
    """The demo's command line, with PRe and with LaVer, side by side: on the device in both types, on the CPU in
    float32. In a rehearsal the device is the CPU, and bf16 alone has something to be compared with."""
    with tempfile.TemporaryDirectory(prefix="digits-") as scratch:
        data = Path(scratch) / "digits"
        made = ["data", "demo", f"out={data}", "num_scenes=200", "val_fraction=0.2", "scenes_per_shard=64"]
        error = _command(made, {}, 60)
        record.check("nemo-pre data demo", error or "made", "made", not error)
        here = "cpu" if record.on_cpu else "gpu"
        kinds = {(here, "fp32"), (here, "bf16"), ("cpu", "fp32")}
        runs = sorted((method, *kind) for method in EXPERIMENTS for kind in kinds)
        cores = str(max(len(os.sched_getaffinity(0)) // len(runs), 1))

        def train(run: tuple[str, str, str]) -> tuple[str, list[dict[str, float]]]:
            method, platform, precision = run
            output = Path(scratch) / "-".join(run)
            words = [*EXPERIMENTS[method], f"platform={platform}", f"precision={precision}"]
            words += [f"output_dir={output}", f"data.path={data}", f"trainer.max_steps={STEPS}", *SHAPE]
            error = _command(["train", *words], {"OMP_NUM_THREADS": cores}, 900 if record.on_cpu else 85)
            return error, [] if error else _metrics(output)

        with ThreadPoolExecutor(len(runs) if not record.on_cpu else 2) as pool:
            found = dict(zip(runs, pool.map(train, runs), strict=True))
    for (method, platform, precision), (error, rows) in found.items():
        label = f"{method}, {precision} on the {platform}"
        record.check(f"{label}: {STEPS} steps", error or f"{len(rows)} steps", f"{STEPS} steps", len(rows) == STEPS)
        curves = {name: [round(row[name], 5) for row in rows if name in row] for name in QUANTITIES}
        record.fact(label, {name: values for name, values in curves.items() if values})
        if (platform, precision) != ("cpu", "fp32"):  # which is what the others are compared with
            _compare(record, label, rows, found[method, "cpu", "fp32"][1], WITHIN[precision])


def _compare(
    record: Record, label: str, rows: Sequence[dict[str, float]], reference: Sequence[dict[str, float]], within: float
) -> None:
    """The step that is farthest off, of every quantity, by the largest of its values; a cosine's are out of 1."""
    if not rows or len(rows) != len(reference):
        return  # which has been told
    for name in QUANTITIES:
        both = zip(rows, reference, strict=True)
        pairs = [(row.get(name, float("nan")), other[name]) for row, other in both if name in other]
        if pairs:
            of_laver = "laver/mim" in reference[0]
            bound = within * (1 if name in ("lm/loss", "pre/cosine") else OF_LAVER if of_laver else 2)
            scale = 1.0 if name == "pre/cosine" else max(abs(other) for _, other in pairs)
            errors = [abs(one - other) / scale for one, other in pairs]
            worst = max(errors, key=lambda error: (error != error, error))  # NaN above all
            record.at_most(f"{label}: {name}, worst of {len(pairs)} steps", worst, bound, "from the CPU's float32")


def _metrics(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "lm/loss" in row]


def _command(words: Sequence[str], variables: dict[str, str], limit: float) -> str:
    """Run ``nemo-pre`` with the words; the last line of what it said if it failed. One that hangs is not to take along
    what those beside it found."""
    command = [sys.executable, "-m", "nemo_pre.cli", *words]
    environment = {**os.environ, **variables}
    try:
        run = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=limit,
        )
    except subprocess.TimeoutExpired as expired:
        said = [text.decode(errors="replace") for text in (expired.stdout, expired.stderr) if isinstance(text, bytes)]
        print(f"----- nemo-pre {' '.join(words)}: no end after {limit} s\n{''.join(said)[-4000:]}", flush=True)
        return f"no end after {limit:g} s"
    told = f"exit code {run.returncode}\n{run.stdout[-1500:]}\n{run.stderr[-3000:]}"
    print(f"----- nemo-pre {' '.join(words)}: {told}", flush=True)
    if run.returncode == 0:
        return ""
    return ([line for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"])[-1][:200]


def pre_step(record: Record) -> None:
    """PRe beside plain NeVA."""
    _beside(record, "neva", "pre")


def laver_step(record: Record) -> None:
    """LaVer beside mixed attention and 2D-RoPE alone."""
    _beside(record, "neva_spatial", "laver")


def _beside(record: Record, plain: str, side: str) -> None:
    """Two runs of the product take turns; the ratio is held against the planner's and, for LaVer, the bound."""
    from benchmarks.overhead import WALL, Settings, compared, measure_in_turns, run_config
    from benchmarks.step_anatomy import part_sides
    from nemo_pre.config.derived import num_visual_tokens
    from nemo_pre.planner.devices import Efficiency
    from nemo_pre.planner.load import largest_load
    from nemo_pre.planner.step_time import step_time

    model = "digits_tiny" if record.on_cpu else "llava15_7b"
    settings = Settings(
        name="first_contact",
        sides={name: words for name, words in part_sides(model).items() if name in (plain, side)},
        model=model,
        layers=None if record.on_cpu else 4,
        precision="fp32" if record.on_cpu else "bf16",
        micro_batch_size=2,
        num_microbatches=2,
        sequence_length=None,
        blocks=2 if record.on_cpu else 6,
        steps_per_block=2 if record.on_cpu else 4,
    )
    with tempfile.TemporaryDirectory(prefix="beside-") as scratch:
        times, memory, machine = measure_in_turns(multiprocessing.get_context("spawn"), settings, scratch)
        configs = {name: run_config(settings, name, scratch, 1) for name in settings.sides}
    result = compared(times, WALL)
    for name in settings.sides:
        record.fact(f"{name}, ms a step", result[f"{name}_median_ms"])
        record.fact(f"{name}, peak GiB", memory[name] and round(memory[name] / 2**30, 2))
    ratio, quartiles = result[side]["ratio"], result[side]["ratio_quartiles"]
    record.fact("quartiles of the ratio", quartiles)
    record.fact("machine", machine)
    counted = {name: sum(map(len, blocks)) for name, blocks in times.items()}
    asked = settings.blocks * settings.steps_per_block
    record.check("steps timed", counted, f"{asked} a side", set(counted.values()) == {asked})
    record.only_with_a_gpu("the time of a step at 7B width")
    sheet = data_sheet()
    planned = {
        name: step_time(config, largest_load(config), sheet, Efficiency()).seconds for name, config in configs.items()
    }
    expected = planned[side] / planned[plain]
    within = 0.05 if side == "laver" else 0.02
    record.near(f"{side}: step time of {plain}'s", ratio, expected, within, "the planner's ratio")
    for name in settings.sides:
        milliseconds = result[f"{name}_median_ms"]
        record.near(f"{name}: ms a step", milliseconds, 1000 * planned[name], 0.5, "the planner's")
    if side == "laver":
        share = num_visual_tokens(configs[side].model) / configs[side].data.sequence_length
        record.at_most("laver: of the bound 1 + 1.33 f", ratio / (1 + 4 / 3 * share), 1.05, f"f = {share:.3f}")


def in_processes(target: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What processes of their own send back, all at once; None of one that ended without."""
    context = multiprocessing.get_context("spawn")
    pipes = []
    for each in arguments:
        pipe, child = context.Pipe()
        process = context.Process(target=target, args=(child, *each))
        process.start()
        child.close()
        pipes.append((pipe, process))
    found = []
    for pipe, process in pipes:
        try:
            found.append(pipe.recv())
        except EOFError:
            found.append(None)
        process.join()
    return found
