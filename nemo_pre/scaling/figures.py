"""Strong and weak scaling, overhead against size, and cost; simulated points are hollow and said to be so."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_pre.plots import COLOURS, STYLES
from nemo_pre.scaling.results import SIMULATED, Result, overheads

Panel = Callable[[Any, Sequence[Result], float | None], bool]


def draw(results: Sequence[Result], out: Path, price: float | None) -> list[Path]:
    """Write every figure there is something for, as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, panel in PANELS.items():
        figure, axis = pyplot.subplots(figsize=(6.4, 4.4))
        if panel(axis, results, price):
            _finish(axis, results)
            for kind in ("png", "svg"):
                written.append(out / f"{name}.{kind}")
                figure.savefig(written[-1], dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    return written


def _finish(axis: Any, results: Sequence[Result]) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    simulated = any(result.source == "simulated" for result in results)
    mixed = simulated and any(result.source == "measured" for result in results)
    note = f"hollow: {SIMULATED}" if mixed else (SIMULATED if simulated else "measured")
    axis.set_title(f"{axis.get_title()}\n({note})", fontsize=9)


# A panel draws itself and tells whether there was something to draw.


def _strong(axis: Any, results: Sequence[Result], price: float | None) -> bool:
    axis.set_title("strong scaling: the same batch on more GPUs")
    axis.set_ylabel("samples a second")
    axis.set_xlabel("GPUs")
    _gpus_axis(axis, results)
    axis.set_yscale("log")
    _plain_numbers(axis.yaxis)
    drawn = False
    for label, style, line in _lines(results, "strong"):
        gpus = [result.point.gpus for result in line]
        rates = [result.samples_per_second or 0.0 for result in line]
        axis.plot(gpus, rates, label=label, **style)
        axis.plot(gpus, [rates[0] * n / gpus[0] for n in gpus], color=style["color"], linewidth=0.6, alpha=0.4)
        drawn = True
    return drawn


def _weak(axis: Any, results: Sequence[Result], price: float | None) -> bool:
    axis.set_title("weak scaling: the batch grows with the GPUs")
    axis.set_ylabel("samples a second and GPU, beside the fewest GPUs")
    axis.set_xlabel("GPUs")
    _gpus_axis(axis, results)
    drawn = False
    for label, style, line in _lines(results, "weak"):
        rates = [(result.samples_per_second or 0.0) / result.point.gpus for result in line]
        axis.plot([result.point.gpus for result in line], [rate / rates[0] for rate in rates], label=label, **style)
        drawn = True
    axis.set_ylim(bottom=0)
    return drawn


def _overhead(axis: Any, results: Sequence[Result], price: float | None) -> bool:
    axis.set_title("overhead: time of a sample beside the same run without a regularizer")
    axis.set_xlabel("billions of parameters of the language model")
    axis.set_ylabel("times")
    axis.set_xscale("log")
    _plain_numbers(axis.xaxis)
    found = overheads(results)
    for number, (regularizer, points) in enumerate(found.items()):
        for source in ("simulated", "measured"):
            chosen = [(result.parameters / 1e9, ratio) for result, ratio in points if result.source == source]
            if chosen:
                style = {**_marker(COLOURS[number % len(COLOURS)], source), "linestyle": "none"}
                axis.plot(*zip(*sorted(chosen), strict=True), label=regularizer, **style)
    axis.axhline(1.0, color="grey", linewidth=0.8)
    return bool(found)


def _cost(axis: Any, results: Sequence[Result], price: float | None) -> bool:
    axis.set_title("cost of the recipe's data against the time it takes")
    axis.set_xlabel("days")
    axis.set_ylabel("GPU hours" if price is None else f"cost at {price:g} a GPU hour")
    axis.set_xscale("log")
    axis.set_yscale("log")
    _plain_numbers(axis.xaxis, axis.yaxis)
    drawn = False
    for label, style, line in _lines(results, "strong"):
        days = [result.days or 0.0 for result in line]
        axis.plot(days, [(result.gpu_hours or 0.0) * (price or 1.0) for result in line], label=label, **style)
        for result, day in zip(line, days, strict=True):
            text = {"fontsize": 6, "textcoords": "offset points", "xytext": (3, 3)}
            axis.annotate(str(result.point.gpus), (day, (result.gpu_hours or 0.0) * (price or 1.0)), **text)
        drawn = True
    return drawn


def _depth(axis: Any, results: Sequence[Result], price: float | None) -> bool:
    """Draw the loss over the target layer's depth, of finished runs only: a simulation says nothing about what a model
    has learnt."""
    axis.set_title("target layer")
    axis.set_xlabel("part of the decoder's depth")
    axis.set_ylabel("val/lm_loss at the end")
    finished = [r for r in results if r.point.depth is not None and "val/lm_loss" in r.quality]
    for number, name in enumerate(dict.fromkeys(result.point.experiment for result in finished)):
        points = sorted(
            (r.point.depth or 0.0, r.quality["val/lm_loss"]) for r in finished if r.point.experiment == name
        )
        axis.plot(*zip(*points, strict=True), label=name, **_marker(COLOURS[number % len(COLOURS)], "measured"))
    return bool(finished)


PANELS: dict[str, Panel] = {
    "strong_scaling": _strong,
    "weak_scaling": _weak,
    "overhead": _overhead,
    "cost": _cost,
    "target_depth": _depth,
}


def _plain_numbers(*scales: Any) -> None:
    """Label the scales with plain numbers rather than powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter

    for scale in scales:
        scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())


def _gpus_axis(axis: Any, results: Sequence[Result]) -> None:
    axis.set_xscale("log", base=2)
    gpus = sorted({result.point.gpus for result in results})
    axis.set_xticks(gpus, [str(number) for number in gpus])


def _lines(results: Sequence[Result], batch: str) -> Iterator[tuple[str, dict[str, Any], list[Result]]]:
    """Points of one curve, by GPUs: a colour per experiment, a line style per regularizer."""
    curves: dict[tuple[str, str, str, float | None, str], list[Result]] = {}
    for result in results:
        point = result.point
        if point.batch == batch and result.step_seconds is not None:
            key = (point.experiment, point.regularizer, point.layout, point.depth, result.source)
            curves.setdefault(key, []).append(result)
    experiments = list(dict.fromkeys(key[0] for key in curves))
    regularizers = list(dict.fromkeys(key[1] for key in curves))
    for (experiment, regularizer, layout, depth, source), line in curves.items():
        colour = COLOURS[experiments.index(experiment) % len(COLOURS)]
        style = {**_marker(colour, source), "linestyle": STYLES[regularizers.index(regularizer) % len(STYLES)]}
        at = "" if depth is None else f", depth {depth:g}"
        label = f"{experiment}, {regularizer}{at}" + ("" if layout == "best" else f", {layout}")
        yield label, style, sorted(line, key=lambda result: result.point.gpus)


def _marker(colour: str, source: str) -> dict[str, Any]:
    face = colour if source == "measured" else "none"
    return {"color": colour, "marker": "o", "markersize": 4, "markerfacecolor": face, "linewidth": 1.2}
