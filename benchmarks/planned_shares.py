"""What the planner says that a step waits for, on the recipes docs/performance.md speaks of; nothing is measured.

    python -m benchmarks.planned_shares

A wait is what the step's time loses where the links it needs are taken to be infinitely fast.
"""

from __future__ import annotations

from dataclasses import replace

from nemo_pre.config.compose import compose_run
from nemo_pre.planner.activations import LayerActivations
from nemo_pre.planner.devices import Efficiency, device_of_cluster
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.step_time import chunk_seconds, step_time

EXPERIMENTS = [
    f"siglip2_qwen25_{size}_{stage}"
    for size in ("7b", "14b", "32b", "72b")
    for stage in ("stage2_full_pre", "laver_stage2_knowledge")
]
FAST = 1e30  # bytes a second
COLUMNS = ("gradients %", "weights' gather %", "tensor parallel %", "teacher %", "gathered %", "layer ms", "kept GB/s")


def shares(experiment: str) -> list[float]:
    """Share of the step's time with gradients that are reduced after the backward pass; and of a layer's forward pass
    the milliseconds, and the rate at which it makes what is kept for backward."""
    config = compose_run([f"experiment={experiment}", "parallel.overlap_grad_reduce=false"])
    device, load, efficiency = device_of_cluster(config.cluster), largest_load(config), Efficiency()
    assert device is not None
    step = step_time(config, load, device, efficiency)
    without_links = step_time(config, load, replace(device, nvlink=FAST, network=FAST), efficiency)
    without_nvlink = step_time(config, load, replace(device, nvlink=FAST), efficiency)
    busiest = max(step.stages)
    config.objective.laver.teacher_memory = "gathered"
    gathered = step_time(config, load, device, efficiency)
    layers = config.model.language.num_layers // config.parallel.pipeline // (config.parallel.virtual_pipeline or 1)
    forward = chunk_seconds(config, load, 0, device, efficiency)[0][0] / layers  # with the encoder's share
    kept = LayerActivations(config, load, fused=True).everything
    return [
        100 * step.gradients / step.seconds,
        100 * (step.optimizer - without_links.optimizer) / step.seconds,
        100 * (busiest - max(without_nvlink.stages)) / busiest,
        100 * sum(step.objectives.values()) / step.seconds,
        100 * sum(gathered.objectives.values()) / gathered.seconds,
        1000 * forward,
        kept / forward / 1e9,
    ]


def main() -> None:
    print(f"{'':42}" + "".join(f"{name:>20}" for name in COLUMNS))
    for experiment in EXPERIMENTS:
        print(f"{experiment:42}" + "".join(f"{value:20.1f}" for value in shares(experiment)))


if __name__ == "__main__":
    main()
