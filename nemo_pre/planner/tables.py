"""A plan as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.cost import Message
from nemo_pre.planner.devices import Device, Efficiency
from nemo_pre.planner.plan import Plan
from nemo_pre.planner.search import Found, describe_layout, layout_words
from nemo_pre.planner.step_time import StepTime

NOT_CHECKED = "Memory of fused layers and all times are estimates, never checked on a GPU."


def describe_plan(plan: Plan, device: Device, efficiency: Efficiency) -> str:
    """Parameters, FLOPs and the memory of the stages that differ."""
    config, load = plan.config, plan.load
    total_flops = sum(plan.flops.values())
    lines = [
        f"run {config.name} on {device.name}: {describe_layout(config)}",
        f"  rows of {load.length} tokens, {load.images} image(s) and {load.visual} visual tokens each"
        + (f", a second sequence of {load.branch}" if load.branch else "")
        + f"; {config.trainer.global_batch_size} samples a step",
        "",
        table(
            ["part", "parameters"],
            [[part, count(number)] for part, number in plan.parameters.items() if number]
            + [["all", count(sum(plan.parameters.values()))]],
        ),
        "",
        table(
            ["FLOPs of a step", "10^15", "share"],
            [[part, f"{n / 1e15:.3g}", f"{100 * n / total_flops:.1f}%"] for part, n in plan.flops.items()]
            + [["all", f"{total_flops / 1e15:.4g}", ""]],
        ),
    ]
    lines += plan.not_counted
    if plan.problem is not None:
        better = [_describe_better(plan.better, None)] if plan.better is not None else []
        return "\n".join([*lines, "", f"This layout cannot be: {plan.problem}.", *better])
    stages = sorted(plan.stages)
    kinds = list(dict.fromkeys(kind for stage in stages for kind in plan.stages[stage][1].by_kind))
    rows = [["parameters", *(count(plan.stages[stage][0]) for stage in stages)]]
    rows += [[kind, *(gb(plan.stages[stage][1].by_kind.get(kind, 0)) for stage in stages)] for kind in kinds]
    rows += [["all, GB", *(gb(plan.stages[stage][1].total) for stage in stages)]]
    rows += [["micro-batches in flight", *("+".join(map(str, plan.stages[s][1].in_flight)) for s in stages)]]
    stage, memory = plan.fullest
    available = device.memory * efficiency.memory
    missing = memory.total - available
    verdict = f"does not fit by {gb(missing)} GB" if missing > 0 else f"fits, {gb(-missing)} GB to spare"
    return "\n".join(
        [
            *lines,
            "",
            table(["GB of a rank, by kind", *(f"stage {stage + 1}" for stage in stages)], rows),
            *_describe_messages(plan.messages),
            f"fullest: stage {stage + 1} with {gb(memory.total)} GB of {gb(available)} "
            f"({gb(device.memory)} x {efficiency.memory:g}): {verdict}",
        ]
    )


def _describe_messages(messages: Sequence[Message]) -> list[str]:
    return [
        f"{message.kind} of a micro-batch, stage {message.source + 1} to {message.target + 1}: "
        f"{message.bytes / 1e6:.1f} MB from each rank"
        for message in messages
    ]


def describe_times(plan: Plan, device: Device, efficiency: Efficiency, price: float | None = None) -> str:
    """Step time, throughput, cost, what reads the data, and a better split of the pipeline if there is one.

    Args:
        price: of a GPU hour.
    """
    time, steps = plan.time, plan.config.trainer.max_steps
    assert time is not None
    rows = [
        ["step", f"{time.seconds:.3g} s"],
        ["  pipeline", f"{time.pipeline:.3g} s, bubble {100 * time.bubble:.1f}%, balance {time.balance:.2f}"],
        ["  gradients", f"{time.gradients:.3g} s"],
        ["  optimizer", f"{time.optimizer:.3g} s"],
        *([f"  {kind}", f"{seconds:.3g} s"] for kind, seconds in time.objectives.items()),
        ["tokens a second", f"{time.tokens_per_second:,.0f}"],
        ["model FLOPs utilization", f"{100 * time.utilization(device):.1f}% of {time.ranks} x {device.bf16 / 1e12:g}"],
        [f"{steps} steps", f"{time.seconds * steps / 86400:.3g} days, {plan.gpu_hours:,.0f} GPU hours"],
        ["  samples", f"{steps * plan.config.trainer.global_batch_size:,}"],
    ]
    if price is not None:
        rows.append([f"  cost at {price:g} a GPU hour", f"{plan.gpu_hours * price:,.0f}"])
    fp8 = f", {device.fp8 / 1e12:g} in fp8" if device.fp8 else ""
    sheet = f"{device.name}: {device.bf16 / 1e12:g} TFLOP/s in bf16{fp8}, {device.bandwidth / 1e12:.2f} TB/s"
    assumed = ", ".join(f"{name} {value:g}" for name, value in vars(efficiency).items())
    lines = [table(["estimate", ""], rows), f"{sheet}; assumed of it: {assumed}.", NOT_CHECKED, _describe_data(plan)]
    if plan.better is not None:
        lines.append(_describe_better(plan.better, time))
    return "\n".join(lines)


def _describe_data(plan: Plan) -> str:
    layout, workers = plan.config.parallel, max(plan.config.data.num_workers, 1)
    return (
        f"Shards: {layout.data} replica(s) x {workers} worker(s) = {plan.readers} readers. nemo-pre's loader reads "
        f"at random, one shard is enough; loaders that read from end to end (WebDataset, Energon) need {plan.readers}."
    )


def _describe_better(better: tuple[RunConfig, StepTime], time: StepTime | None) -> str:
    config, faster = better
    layers = config.parallel.pipeline_layers
    split = "null" if layers is None else "[" + ",".join(map(str, layers)) + "]"
    than = f", not {time.seconds:.3g} s (balance {time.balance:.2f})" if time is not None else ""
    return (
        f"With parallel.pipeline_layers={split}, layers dealt out by cost, a step takes {faster.seconds:.3g} s "
        f"(balance {faster.balance:.2f}){than}."
    )


def describe_search(found: Found, gpus: int, device: Device, steps: int, price: float | None = None) -> str:
    """The best layouts, the options that give the first, and why others are not among them."""
    if not found.best:
        lines = [f"No layout of {gpus} {device.name} fits."]
    else:
        rows = [
            [
                describe_layout(candidate.config),
                f"{candidate.time.seconds:.3g} s",
                gb(candidate.memory),
                f"{100 * candidate.time.bubble:.1f}%",
                f"{100 * candidate.time.utilization(device):.1f}%",
                f"{candidate.time.seconds * steps * gpus / 3600:,.0f}",
                *([] if price is None else [f"{candidate.time.seconds * steps * gpus / 3600 * price:,.0f}"]),
            ]
            for candidate in found.best
        ]
        header = [f"best of {found.fitting} layouts of {gpus} {device.name}", "step", "GB", "bubble", "MFU", "GPU h"]
        lines = [table([*header, *([] if price is None else ["cost"])], rows)]
        lines.append(f"The first: {' '.join(layout_words(found.best[0].config))}")
    for kind, refused in found.refused.items():
        lines.append(f"{refused.number} refused, {kind}; e.g. {refused.nearest}")
    return "\n".join(lines)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The rows as text in columns, the first flush left, the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = []
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])] + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def count(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def gb(number: float) -> str:
    return f"{number / 1e9:.1f}"
