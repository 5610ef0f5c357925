"""The planner's memory against what a GPU's allocator saw, for several layouts of one GPU at 7B width.

    python -m benchmarks.planned_memory

Every setting is a few steps of the product in a process of its own; compared are the bytes allocated at the peak (the
planner's total without the libraries' own, which the allocator does not see). Needs a GPU.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
from datetime import datetime, timezone
from typing import Any

from benchmarks.overhead import RESULTS, Settings, describe_machine, fit, peak_memory, reset_peak, run_config
from nemo_pre.config.run import RunConfig
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.memory import RankMemory, rank_memory

STEPS = 4
NONE, PRE = ["objective=none"], ["objective=pre"]
LAVER = ["model.attention=mixed", "model.rope=2d", "objective=laver/paper", "objective.laver.mask_schedule=constant"]
# model, decoder layers, micro-batch, precision, the rest
CASES: list[tuple[str, int, int, str, list[str]]] = [
    ("llava15_7b", 4, 1, "bf16", NONE),
    ("llava15_7b", 4, 4, "bf16", NONE),
    ("llava15_7b", 8, 2, "bf16", PRE),
    ("llava15_7b", 8, 4, "bf16", [*PRE, "parallel.recompute=full"]),
    ("llava15_7b", 8, 4, "bf16", [*NONE, "parallel.recompute=selective"]),
    ("llava15_7b", 32, 2, "bf16", [*PRE, "optim.freeze_language=true"]),
    ("siglip2_qwen25_7b", 4, 2, "bf16", LAVER),
    ("siglip2_qwen25_7b", 4, 2, "fp8_tensorwise", NONE),
]


def main() -> None:
    import torch

    if not torch.cuda.is_available():
        sys.exit("This compares the planner with a GPU's allocator, and torch sees no GPU.")
    context = multiprocessing.get_context("spawn")
    found = []
    for number in range(len(CASES)):
        pipe, child = context.Pipe()
        process = context.Process(target=run_case, args=(child, number))
        process.start()
        child.close()
        try:
            found.append(pipe.recv())
        except EOFError:
            found.append({"case": describe(number), "failed": "the process ended without a result"})
        process.join()
        print(json.dumps(found[-1]), flush=True)
        write(found)


def run_case(pipe: Any, number: int) -> None:
    from lightning.pytorch.callbacks import Callback

    settings = settings_of(number)

    class AfterTheFirstStep(Callback):
        """The first allocates the optimizer's state and TE's workspaces."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                reset_peak()

    with tempfile.TemporaryDirectory(prefix="memory-") as scratch:
        _, planned = planned_case(number, scratch)
        fit(settings, "case", scratch, STEPS, AfterTheFirstStep, megatron_layers=False)
    expected = planned.total - planned.by_kind.get("libraries", 0)
    measured = peak_memory()
    pipe.send(
        {
            "case": describe(number),
            "machine": describe_machine(True),
            "measured_bytes": measured,
            "planned_bytes": expected,
            "planned_over_measured": round(expected / measured, 4),
            "by_kind": planned.by_kind,
        }
    )


def settings_of(number: int) -> Settings:
    """A case as the overhead benchmarks' settings."""
    model, layers, rows, precision, words = CASES[number]
    return Settings(
        name="planned_memory",
        sides={"case": [*words, f"precision={precision}"]},
        model=model,
        layers=layers,
        precision=precision,
        micro_batch_size=rows,
        num_microbatches=2,
        sequence_length=None,
        blocks=1,
        steps_per_block=STEPS,
    )


def planned_case(number: int, output: str) -> tuple[RunConfig, RankMemory]:
    """The run of a case, and the memory that is planned for its one rank."""
    config = run_config(settings_of(number), "case", output, STEPS)
    return config, rank_memory(config, largest_load(config), 0, fused=True)


def describe(number: int) -> str:
    model, layers, rows, precision, words = CASES[number]
    return f"{model}, {layers} layers, micro-batch {rows}, {precision}, {' '.join(words)}"


def write(found: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    result = {"date": datetime.now(timezone.utc).strftime("%Y-%m-%d"), "cases": found}
    (RESULTS / "planned_memory_gpu.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
