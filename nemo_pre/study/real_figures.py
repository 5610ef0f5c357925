"""The figures of the study on a language model that has read: one for each question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pre.plots import COLOURS, STYLES
from nemo_pre.report.intervals import Estimate, mean_interval
from nemo_pre.study.figures import finish, or_nan, tidy
from nemo_pre.study.real_summary import PHASES, Summary, by_seed, over_seeds

PHASES_FIGURE, LAYERS, TRADE_OFF, ANSWERS = "phases.png", "layers.png", "trade_off.png", "answers.png"
PANELS = (
    ("concept", "probe: concept, held-out style"),
    ("colour", "probe: colour"),
    ("place", "probe: place"),
    ("pairwise_cosine", "cosine of two visual tokens"),
    ("coupling", "coupling"),
    ("contrast_difference", "cohesion - coupling"),
    ("effective_dimension", "effective dimension"),
    ("cka_to_layer_0", "CKA to the input"),
    ("says_name_among_10", "logit lens: name among 10 words"),
)
STEP_PHASES = PHASES[2:]


def draw(summary: Summary, out: Path) -> list[str]:
    """Every figure that there is something to show of; their names."""
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    arms = [
        name for name, arm in summary["arms"].items() if any("end" in of["phases"] for of in arm["seeds"].values())
    ]
    drawn = []
    if "baseline" in summary["arms"]:
        curves = [("baseline", phase, phase) for phase in PHASES]
        curves += [("random", "end", "end, random language model")] if "random" in arms else []
        _draw_layers(summary, curves, out / PHASES_FIGURE)
        _draw_trade_off(summary, list(summary["arms"]), out / TRADE_OFF)
        drawn += [PHASES_FIGURE, TRADE_OFF]
    if arms:
        _draw_layers(
            summary, [(arm, "end", summary["arms"][arm]["label"]) for arm in arms[: len(COLOURS)]], out / LAYERS
        )
        _draw_answers(summary, arms[: len(COLOURS)], out / ANSWERS)
        drawn += [LAYERS, ANSWERS]
    return drawn


def _draw_layers(summary: Summary, curves: Sequence[tuple[str, str, str]], out: Path) -> None:
    """A curve over layers for each (arm, phase, label), with its seeds' interval."""
    from matplotlib import pyplot

    depths = summary["settings"]["layers"]
    figure, axes = pyplot.subplots(3, 3, figsize=(11, 9), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        for number, (arm, phase, label) in enumerate(curves):
            points = [over_seeds(summary, arm, f"{name}@{depth} {phase}") for depth in depths]
            if all(point is None for point in points):
                continue
            style = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
            layers = list(depths.values())
            axis.plot(layers, [_end(point, "value") for point in points], label=label, marker=".", **style)
            low, high = ([_end(point, end) for point in points] for end in ("low", "high"))
            axis.fill_between(layers, low, high, color=style["color"], alpha=0.1, linewidth=0)
        tidy(axis, title)
    for axis in axes[-1]:
        axis.set_xlabel("layer (0: what enters the decoder)")
    finish(figure, axes[0][0], out)


def _draw_trade_off(summary: Summary, arms: Sequence[str], out: Path) -> None:
    """Answers against what the middle still holds, along the second stage: a path for each run, its end marked."""
    from matplotlib import pyplot

    steps = summary["settings"]["steps"]
    at = {"1/4": steps // 4, "1/2": steps // 2, "end": steps}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.4))
    for axis, metric, title in (
        (axes[0], "concept@middle", "concept's probe in the middle"),
        (axes[1], "concept change@middle", "the same, less what enters"),
    ):
        for number, arm in enumerate(arms[: len(COLOURS)]):
            label = summary["arms"][arm]["label"]
            for seed, run in summary["arms"][arm]["seeds"].items():
                way = [
                    (
                        run["answers"].get(str(at[phase]), {}).get("exact_match"),
                        _of_seed(summary, arm, metric, phase, seed),
                    )
                    for phase in STEP_PHASES
                ]
                points = [(x, y) for x, y in way if x is not None and y is not None]
                if not points:
                    continue
                x, y = zip(*points, strict=True)
                axis.plot(x, y, color=COLOURS[number], linewidth=1, alpha=0.6)
                axis.plot(x[-1], y[-1], "o", color=COLOURS[number], markersize=5, label=label)
                label = None
        tidy(axis, title)
        axis.set_xlabel("exact match of answers")
    finish(figure, axes[0], out)


def _end(point: Estimate | None, name: str) -> float:
    return math.nan if point is None else or_nan(getattr(point, name))


def _of_seed(summary: Summary, arm: str, metric: str, phase: str, seed: str) -> float | None:
    return by_seed(summary, arm, f"{metric} {phase}").get(seed)


def _draw_answers(summary: Summary, arms: Sequence[str], out: Path) -> None:
    from matplotlib import pyplot

    kinds = answer_kinds(summary)
    figure, axis = pyplot.subplots(figsize=(10, 4))
    for number, arm in enumerate(arms):
        found = [
            mean_interval(values) if (values := list(by_seed(summary, arm, kind).values())) else None for kind in kinds
        ]
        places = [place + (number - len(arms) / 2 + 0.5) * 0.8 / len(arms) for place in range(len(kinds))]
        reach: list[list[Any]] = [
            [abs(_end(point, end) - _end(point, "value")) for point in found] for end in ("low", "high")
        ]
        axis.errorbar(
            places,
            [_end(point, "value") for point in found],
            yerr=reach,
            fmt="o",
            markersize=4,
            color=COLOURS[number],
            label=summary["arms"][arm]["label"],
            elinewidth=1,
        )
    axis.set_xticks(range(len(kinds)), [kind.removeprefix("exact_match").lstrip("/") or "all" for kind in kinds])
    tidy(axis, "exact match of validation answers")
    axis.set_ylim(bottom=0)
    finish(figure, axis, out)


def answer_kinds(summary: Summary) -> list[str]:
    """``exact_match`` and its types, as far as any run has them."""
    found = {
        name
        for arm in summary["arms"].values()
        for seed in arm["seeds"].values()
        for step in seed["answers"].values()
        for name in step
        if name.startswith("exact_match")
    }
    return sorted(found)
