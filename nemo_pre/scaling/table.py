"""A study as text."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_pre.planner.tables import table
from nemo_pre.scaling.results import SIMULATED, Result, overheads


def describe(results: Sequence[Result], price: float | None) -> str:
    """All points, then what the regularizers cost, then what finished runs ended with."""
    parts = [_sources(results), _points(results, price), _overheads(results), _quality(results)]
    return "\n\n".join(part for part in parts if part)


def _sources(results: Sequence[Result]) -> str:
    measured = sum(result.source == "measured" for result in results)
    simulated = len(results) - measured
    lines = [f"{simulated} of {len(results)} points are {SIMULATED}."] if simulated else []
    return "\n".join(lines + ([f"{measured} points are finished runs (measured)."] if measured else []))


def _points(results: Sequence[Result], price: float | None) -> str:
    header = ["run", "source", "batch", "step", "samples/s", "MFU", "GB", "days", "GPU hours"]
    header += [] if price is None else ["cost"]
    rows = []
    for result in results:
        point = result.point
        depth = "" if point.depth is None else f", layer {result.target_layers[0]} ({point.depth:g})"
        row = [f"{point.experiment}, {point.regularizer}{depth}, {point.gpus} GPUs, {point.batch}", result.source]
        if result.step_seconds is None:
            rows.append([*row, str(result.batch_size), "none", *[""] * (len(header) - 4)])
            continue
        row += [str(result.batch_size), f"{result.step_seconds:.3g} s", _number(result.samples_per_second)]
        row += ["" if result.utilization is None else f"{100 * result.utilization:.1f}%"]
        row += ["" if result.bytes is None else f"{result.bytes / 1e9:.1f}"]
        row += [_number(result.days), _number(result.gpu_hours)]
        rows.append(row if price is None else [*row, _number((result.gpu_hours or 0) * price)])
    lines = [table(header, rows)]
    lines += [f"{result.point.name}: {result.problem}." for result in results if result.problem]
    return "\n".join(lines)


def _overheads(results: Sequence[Result]) -> str:
    found = overheads(results)
    rows = [
        [regularizer, f"{result.point.experiment}, {result.point.gpus} GPUs, {result.point.batch}", f"{ratio:.3f}"]
        for regularizer, points in found.items()
        for result, ratio in points
    ]
    return table(["overhead", "of", "time of a sample beside none"], rows) if rows else ""


def _quality(results: Sequence[Result]) -> str:
    finished = [result for result in results if result.quality]
    names = sorted({name for result in finished for name in result.quality})
    rows = [
        [result.point.name, ", ".join(map(str, result.target_layers)) or "-"]
        + [f"{result.quality[name]:.4g}" if name in result.quality else "" for name in names]
        for result in finished
    ]
    return table(["finished run", "target layers", *names], rows) if rows else ""


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
