"""A comparison's table for a terminal and as Markdown: a line per metric and arm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_pre.report.intervals import Difference, Estimate

if TYPE_CHECKING:
    from nemo_pre.report.compare import Cell, Comparison, Row

HEADER = ("metric", "step", "arm", "n", "mean", "95% interval", "difference", "95% interval", "method")
NUMERIC = {"step", "n", "mean", "difference"}  # columns set flush right
LEGEND = (
    "Differences are to the first arm. * the interval excludes 0. Intervals are over seeds, one metric at a time: "
    "among twenty of them one misses by chance."
)


def to_text(comparison: Comparison) -> str:
    header = HEADER[2:]
    lines = [line[2:] for line in _lines(comparison)]
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    text = [_aligned(header, widths)]
    for row in comparison.rows:
        text += ["", f"{row.metric}, {_step(row)}"]
        text += [_aligned(line, widths) for line in lines[: len(row.cells)]]
        lines = lines[len(row.cells) :]
    if comparison.options:
        text += ["", f"options that differ ({' | '.join(arm.label for arm in comparison.arms)}):"]
        text += [f"  {found.option}: {' | '.join(found.values)}" for found in comparison.options]
    return "\n".join([*text, "", *(f"note: {note}" for note in comparison.notes), LEGEND])


def to_markdown(comparison: Comparison) -> str:
    arms = [arm.label for arm in comparison.arms]
    text = ["# Comparison", "", f"Baseline: {_cell(arms[0])}.", ""]
    text += [
        f"- {_cell(arm.label)}: {_cell(', '.join(str(run.directory) for run in arm.runs))}" for arm in comparison.arms
    ]
    align = ["---:" if name in NUMERIC else "---" for name in HEADER]
    text += ["", _row(HEADER), f"| {' | '.join(align)} |", *(_row(line) for line in _lines(comparison))]
    text += ["", LEGEND.replace("*", "\\*"), "", "![curves](comparison.png)"]
    if comparison.options:
        text += ["", "## Options that differ", "", _row(["option", *arms]), _row(["---"] * (len(arms) + 1))]
        text += [_row([found.option, *found.values]) for found in comparison.options]
    if comparison.notes:
        text += ["", "## Notes", "", *(f"- {_cell(note)}" for note in comparison.notes)]
    return "\n".join(text) + "\n"


def _lines(comparison: Comparison) -> list[list[str]]:
    """The cells of the table, arm by arm within each metric; a metric's name stands on its first line only."""
    lines = []
    for row in comparison.rows:
        for number, cell in enumerate(row.cells):
            named = [row.metric, "none" if row.step is None else str(row.step)] if number == 0 else ["", ""]
            lines.append([*named, *_columns(cell, baseline=number == 0)])
    return lines


def _step(row: Row) -> str:
    return "no common step" if row.step is None else f"step {row.step}"


def _columns(cell: Cell, baseline: bool) -> list[str]:
    if cell.estimate is None:
        return [cell.arm, "0", "-", "", "", "", ""]
    value = [cell.arm, str(cell.estimate.n), f"{cell.estimate.value:.4g}", _interval(cell.estimate, "")]
    if baseline:
        return [*value, "baseline", "", ""]
    if cell.difference is None:
        return [*value, "", "", ""]
    return [*value, _shift(cell.difference), _interval(cell.difference.estimate, "+"), cell.difference.method]


def _shift(change: Difference) -> str:
    return f"{change.estimate.value:+.4g}{'*' if change.excludes_zero else ''}"


def _interval(estimate: Estimate, sign: str) -> str:
    if estimate.low is not None and estimate.high is not None:
        return f"[{estimate.low:{sign}.4g}, {estimate.high:{sign}.4g}]"
    if estimate.n < 2:
        return "none (n=1)"
    return "none (not finite)" if math.isnan(estimate.value) else "none (no spread)"


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    columns = zip(HEADER[2:], cells, widths, strict=True)
    text = (cell.rjust(width) if name in NUMERIC else cell.ljust(width) for name, cell, width in columns)
    return "  " + "  ".join(text).rstrip()


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(cell) for cell in cells)} |"


def _cell(text: str) -> str:
    """Text that Markdown takes as text, inside a table too."""
    for mark in "\\|*`<[_":
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")
