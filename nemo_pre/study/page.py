"""The digits study's page: the questions, each with its table and a sentence that says no more than intervals do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pre.study.arms import BASELINE
from nemo_pre.study.figures import ANSWERS, LAYERS, TRADE_OFF
from nemo_pre.study.summary import SUMMARY, Summary

REMARKS = "remarks.md"
ORDER = ("mim", "mixed_2d", "mim_ga", "laver")  # from bad to good, as LaVer (arXiv 2512.06281) reports it
PRE_NUMBERS = (
    "probe_count@middle",
    "probe_presence@middle",
    "contrast_difference@middle",
    "contrast_difference@last",
    "effective_dimension@middle",
)
NAMES = {
    "exact_match": "exact match",
    "loss": "validation loss",
    "probe_count": "probe for the count",
    "probe_presence": "probe for the digits",
    "pairwise_cosine": "cosine of two visual tokens",
    "contrast_difference": "cohesion - coupling",
    "effective_dimension": "effective dimension",
    "coupling": "coupling",
}
SHARES = ("exact_match", "probe_")  # shown as percentages

Metrics = dict[str, dict[str, Any]]


def write_page(summary: Summary, out: Path, page: Path) -> None:
    """The page, with figures and remarks of ``out``."""
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(render(summary, _remarks(out), os.path.relpath(out, page.parent)), encoding="utf-8")


def _remarks(out: Path) -> str:
    file = out / REMARKS
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def render(summary: Summary, remarks: str = "", files: str = ".") -> str:
    """Markdown; ``files``: where the figures are, seen from the page."""
    sections = [
        _intro(summary),
        f"## Remarks\n\n{remarks}" if remarks else "",
        "## Does degradation appear?\n\n" + _degradation(summary) + f"\n\n![measures by layer]({files}/{LAYERS})",
        "## Does PRe lift the middle?\n\n" + _regularized(summary),
        "## Does accuracy follow?\n\n" + _answers(summary) + f"\n\n![exact match]({files}/{ANSWERS})\n\n"
        f"![loss against probes]({files}/{TRADE_OFF})",
        "## Does the order MIM < none < Gram-anchoring < clipped Gram-anchoring appear?\n\n" + _order(summary),
        "## Mixed attention and 2D-RoPE\n\n" + _spatial(summary),
        "## How it was done\n\n" + _method(summary, files),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _intro(summary: Summary) -> str:
    return (
        "# The digits study\n\n"
        "Written by `nemo-pre study digits`; the numbers are those of "
        f"`{SUMMARY}`. Means over seeds with Student's 95% intervals; differences are paired by seed, and * marks an "
        "interval that excludes 0. Of twenty such intervals one misses by chance. An arm of one seed has no interval, "
        "so nothing is concluded from it alone."
    )


# --- the questions --------------------------------------------------------------------------------------------------


def _degradation(summary: Summary) -> str:
    arm = summary["arms"].get(BASELINE)
    if arm is None:
        return _not_run([BASELINE])
    metrics = arm["metrics"]
    rows = []
    told = []
    for name, direction in (("probe_count", -1), ("probe_presence", -1), ("pairwise_cosine", 1), ("coupling", 1)):
        changes = {depth: metrics.get(f"{name} change@{depth}") for depth in ("middle", "last")}
        cells = [_value(name, metrics.get(f"{name}@{depth}")) for depth in ("input", "quarter", "middle", "last")]
        rows.append([NAMES[name], *cells, *(_value(name, change, signed=True) for change in changes.values())])
        judged = [f"{_verdict(change, direction)} by the {depth} layer" for depth, change in changes.items() if change]
        told.append(f"{NAMES[name]}: {', '.join(judged)}")
    header = ["baseline", "input", "quarter", "middle", "last", "middle - input", "last - input"]
    return f"{markdown_table(header, rows)}\n\n{'. '.join(told)}."


def _verdict(change: dict[str, Any], degrading: int) -> str:
    if change["low"] is None:
        return "not to be judged (one seed)" if change["n"] < 2 else "the same in every seed"
    if change["low"] <= 0 <= change["high"]:
        return "no change shown"
    return "degrades" if change["value"] * degrading > 0 else "improves"


def _regularized(summary: Summary) -> str:
    names = [name for name in summary["arms"] if name.startswith(("pre", "viral"))]
    if not names or BASELINE not in summary["arms"]:
        return _not_run([BASELINE, "pre"])
    rows = [_row(summary, BASELINE, PRE_NUMBERS)]
    rows += [_row(summary, name, PRE_NUMBERS, against=BASELINE) for name in names]
    table = markdown_table(["arm", "seeds", *map(_named, PRE_NUMBERS)], rows)
    judged = [name for name in names if len(summary["arms"][name]["seeds"]) > 1]
    told = " ".join(_shown(summary, name, BASELINE, PRE_NUMBERS) for name in judged)
    return f"{table}\n\nRows after the first are differences to it. {told}".rstrip()


def _answers(summary: Summary) -> str:
    kinds = [name for name in _any_metrics(summary) if name.startswith("exact_match/")]
    columns = ["exact_match", *sorted(kinds), "loss"]
    main = [name for name in ("pre", "mixed_2d", "mim", "mim_ga", "laver", "pre_laver") if name in summary["arms"]]
    if BASELINE not in summary["arms"] or not main:
        return _not_run([BASELINE, "pre"])
    rows = [_row(summary, BASELINE, columns)]
    rows += [_row(summary, name, columns, against=BASELINE) for name in main]
    told = " ".join(_shown(summary, name, BASELINE, columns) for name in main)
    table = markdown_table(["arm", "seeds", *map(_named, columns)], rows)
    return f"{table}\n\nRows after the first are differences to it. {told}"


def _order(summary: Summary) -> str:
    held = [name for name in ORDER if name in summary["arms"]]
    if len(held) < 2:
        return _not_run(ORDER)
    wanted = ("exact_match", "exact_match/count", "exact_match/read", "loss", "pairwise_cosine@last")
    columns = [name for name in wanted if name in _any_metrics(summary)]
    rows = [_row(summary, name, columns) for name in held]
    found = sorted(held, key=lambda name: summary["arms"][name]["metrics"]["exact_match"]["value"])
    listed = " < ".join(_short(summary, name) for name in found)
    of_others = [name for name in held if name != "mixed_2d"]
    told = " ".join(_shown(summary, name, "mixed_2d", ("exact_match", "loss")) for name in of_others)
    same = "the published one" if found == held else "not the published one"
    return (
        f"{markdown_table(['arm', 'seeds', *map(_named, columns)], rows)}\n\nBy mean exact match: {listed}, {same}. "
        f"Means alone decide nothing; to the arm without a loss of LaVer's: {told}"
    )


def _spatial(summary: Summary) -> str:
    held = [name for name in ("mixed", "rope_2d", "mixed_2d") if name in summary["arms"]]
    if not held or BASELINE not in summary["arms"]:
        return _not_run(["mixed", "rope_2d", "mixed_2d"])
    wanted = ("exact_match", "loss", "probe_count@middle", "pairwise_cosine@last")
    columns = [name for name in wanted if name in _any_metrics(summary)]
    rows = [_row(summary, BASELINE, columns), *(_row(summary, name, columns, against=BASELINE) for name in held)]
    table = markdown_table(["arm", "seeds", *map(_named, columns)], rows)
    return f"{table}\n\nRows after the first are differences to it."


def _method(summary: Summary, files: str) -> str:
    settings = summary["settings"]
    machine = summary["machine"]
    hours = sum(run["seconds"] for arm in summary["arms"].values() for run in arm["seeds"].values()) / 3600
    runs = sum(len(arm["seeds"]) for arm in summary["arms"].values())
    encoder = settings["encoder"]
    seeing = (
        f"The encoder learned for {encoder['steps']} steps to name what each patch shows (right for "
        f"{encoder['accuracy']:.1%} of the val patches that show a digit) and was frozen; all seeds share it."
        if encoder
        else "The encoder started from random weights."
    )
    weights = "projector and language model from random weights" if encoder else "everything from random weights"
    if settings["language_steps"]:
        seeing += (
            f" The language model, from random weights, learned for {settings['language_steps']} steps the questions "
            f"and answers without their pictures."
        )
        weights = "the projector alone from random weights"
    start = (
        f"{seeing} A first stage of {settings['first_steps']} steps, {weights}, for each kind of attention and "
        f"positions; each arm goes on for {settings['steps']} steps with a frozen encoder, on other samples."
        if settings["first_steps"]
        else f"{seeing} Every arm for {settings['steps']} steps, {weights}."
    )
    listed = ", ".join(settings["options"]) or "none"
    return (
        f"{start} Layers told of: {', '.join(f'{name} {layer}' for name, layer in settings['layers'].items())}. "
        f"Diagnostics on {settings['num_images']} validation images, probes fitted on {settings['num_fit']} training "
        f"images of {settings['train_samples']:,} samples; {settings['val_samples']} questions answered. Options of "
        f"all runs: {listed}. {runs} runs, "
        f"{hours:.1f} run-hours, {machine['cores']} cores, {machine['gpus']} GPUs, {summary['date']}. Every number of "
        f"every run: [{SUMMARY}]({files}/{SUMMARY})."
    )


# --- tables ---------------------------------------------------------------------------------------------------------


def _row(summary: Summary, name: str, columns: Sequence[str], against: str | None = None) -> list[str]:
    arm = summary["arms"][name]
    metrics: Metrics = arm["metrics"] if against is None else arm["against"].get(against, {})
    cells = [_value(column, metrics.get(column), signed=against is not None) for column in columns]
    return [arm["label"], str(len(arm["seeds"])), *cells]


def _value(metric: str, estimate: dict[str, Any] | None, signed: bool = False) -> str:
    if estimate is None:
        return "-"
    low, high = estimate["low"], estimate["high"]
    plus = "+" if signed else ""
    if metric.startswith(SHARES):
        value, *ends = (f"{100 * number:{plus}.1f}" for number in (estimate["value"], low, high) if number is not None)
        value += "%"
    else:
        value, *ends = (f"{number:{plus}.3g}" for number in (estimate["value"], low, high) if number is not None)
    star = " *" if signed and ends and (low > 0 or high < 0) else ""
    return f"{value} [{', '.join(ends)}]{star}" if ends else value


def _shown(summary: Summary, name: str, against: str, columns: Sequence[str]) -> str:
    """Which differences an interval keeps apart from 0."""
    arm = summary["arms"].get(name)
    if arm is None or against not in arm["against"]:
        return ""
    found = {column: arm["against"][against][column] for column in columns if column in arm["against"][against]}
    apart = [
        f"{_named(column)} {'higher' if estimate['value'] > 0 else 'lower'}"
        for column, estimate in found.items()
        if estimate["low"] is not None and (estimate["low"] > 0 or estimate["high"] < 0)
    ]
    label = _short(summary, name)
    if all(estimate["n"] < 2 for estimate in found.values()):
        return f"{label}: one seed, not to be judged."
    return f"{label}: {', '.join(apart)}." if apart else f"{label}: no difference shown."


def _short(summary: Summary, name: str) -> str:
    return str(summary["arms"][name]["label"])


def _named(metric: str) -> str:
    """``probe_count@middle`` as words."""
    name, _, depth = metric.partition("@")
    kind = name.partition("/")[2]
    words = kind or NAMES.get(name, name)
    return f"{words}, {depth}" if depth else words


def _any_metrics(summary: Summary) -> Metrics:
    return next((arm["metrics"] for arm in summary["arms"].values()), {})


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _not_run(names: Sequence[str]) -> str:
    return f"Not run: it takes the arms {', '.join(names)}."
