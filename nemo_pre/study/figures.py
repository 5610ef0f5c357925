"""The study's figures: measures layer by layer, answers by type, and language against probes over training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_pre.plots import COLOURS, STYLES
from nemo_pre.report.intervals import mean_interval
from nemo_pre.study.summary import Summary

LAYERS, ANSWERS, TRADE_OFF = "layers.png", "answers.png", "trade_off.png"
PANELS = (
    ("probe_count", "probe: number of digits"),
    ("probe_presence", "probe: which digits"),
    ("pairwise_cosine", "cosine of two visual tokens"),
    ("contrast_difference", "cohesion - coupling"),
    ("effective_dimension", "effective dimension"),
    ("cka_to_layer_0", "CKA to layer 0"),
)


def draw(summary: Summary, out: Path) -> None:
    """``out/layers.png``, ``answers.png`` and ``trade_off.png`` of the arms with the most seeds, at most 7."""
    import matplotlib

    matplotlib.use("Agg")

    arms = _main_arms(summary)
    out.mkdir(parents=True, exist_ok=True)
    _draw_layers(arms, out / LAYERS)
    _draw_answers(arms, out / ANSWERS)
    _draw_trade_off(arms, summary["settings"]["layers"]["middle"], out / TRADE_OFF)


def _main_arms(summary: Summary) -> list[dict[str, Any]]:
    arms = [arm for name, arm in summary["arms"].items() if not name.startswith("first_")] or [
        *summary["arms"].values()
    ]
    most = max(len(arm["seeds"]) for arm in arms)
    return [arm for arm in arms if len(arm["seeds"]) == most][: len(COLOURS)]


def _draw_layers(arms: Sequence[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(11, 6.4), sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS, strict=True):
        for number, arm in enumerate(arms):
            curves = [_curve(seed["layers"], name) for seed in arm["seeds"].values()]
            points = [mean_interval(list(values)) for values in zip(*curves, strict=True)]
            layers = range(len(points))
            style = {"color": COLOURS[number], "linestyle": STYLES[number % len(STYLES)]}
            axis.plot(layers, [point.value for point in points], label=arm["label"], linewidth=1.5, **style)
            low, high = ([or_nan(getattr(p, end)) for p in points] for end in ("low", "high"))
            axis.fill_between(layers, low, high, color=COLOURS[number], alpha=0.1, linewidth=0)
        tidy(axis, title)
    for axis in axes[1]:
        axis.set_xlabel("layer (0: what enters the decoder)")
    finish(figure, axes[0][0], out)


def _draw_answers(arms: Sequence[dict[str, Any]], out: Path) -> None:
    from matplotlib import pyplot

    kinds = [
        "exact_match",
        *sorted({name for arm in arms for name in arm["metrics"] if name.startswith("exact_match/")}),
    ]
    figure, axis = pyplot.subplots(figsize=(10, 4))
    for number, arm in enumerate(arms):
        found = [arm["metrics"].get(kind, {}) for kind in kinds]
        values = [or_nan(of.get("value")) for of in found]
        reach = [
            [abs(or_nan(of.get(end)) - value) for of, value in zip(found, values, strict=True)]
            for end in ("low", "high")
        ]
        places = [place + (number - len(arms) / 2 + 0.5) * 0.8 / len(arms) for place in range(len(kinds))]
        axis.errorbar(
            places, values, yerr=reach, fmt="o", markersize=4, color=COLOURS[number], label=arm["label"], elinewidth=1
        )
    axis.set_xticks(range(len(kinds)), [kind.removeprefix("exact_match").lstrip("/") or "all" for kind in kinds])
    tidy(axis, "exact match of validation answers")
    axis.set_ylim(bottom=0)
    finish(figure, axis, out)


def _draw_trade_off(arms: Sequence[dict[str, Any]], middle: int, out: Path) -> None:
    """A path per run, from its first record to its last, which is marked."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.2))
    for axis, (name, title) in zip(axes, PANELS[:2], strict=True):
        for number, arm in enumerate(arms):
            for place, run in enumerate(arm["seeds"].values()):
                task = name.removeprefix("probe_")
                way = [(at["loss"], at["probes"][task]) for at in run["over_training"] if task in at["probes"]]
                if not way:
                    continue
                losses, accuracies = zip(*way, strict=True)
                axis.plot(losses, accuracies, color=COLOURS[number], linewidth=1, alpha=0.6)
                label = arm["label"] if place == 0 else None
                axis.plot(losses[-1], accuracies[-1], "o", color=COLOURS[number], markersize=5, label=label)
        tidy(axis, f"{title}, layer {middle}")
        axis.set_xlabel("loss (nats per token)")
    finish(figure, axes[0], out)


def _curve(layers: Sequence[dict[str, Any]], name: str) -> list[float]:
    if name.startswith("probe_"):
        task = name.removeprefix("probe_")
        return [or_nan(layer["probe"].get(task, {}).get("accuracy")) for layer in layers]
    return [or_nan(layer[name]) for layer in layers]


def or_nan(value: float | None) -> float:
    return math.nan if value is None else float(value)


def tidy(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def finish(figure: Any, named: Any, out: Path) -> None:
    from matplotlib import pyplot

    handles, labels = named.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.03 + 0.03 * math.ceil(len(labels) / 3), 1, 1))
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
