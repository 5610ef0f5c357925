"""The distributions as one figure: splits beside each other in every panel, as shares of their samples."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from data_prep.stats.count import Counted
from data_prep.stats.summary import SOURCES_SHOWN
from nemo_pre.plots import COLOURS

BINS = 40
FEW = 12  # distinct values: then a bar each


def plot(counted: Counted, out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    length = "tokens" if counted.tokenizer else "characters"
    panels = {f"{length} of text": length, "turns": "turns", "images per sample": "images"}
    figure, axes = pyplot.subplots(1, len(panels) + 2, figsize=(4.2 * (len(panels) + 2), 3.6))
    for axis, (title, name) in zip(axes, panels.items(), strict=False):
        axis.set_title(title)
        _histogram(axis, {split: getattr(counts, name) for split, counts in counted.splits.items()})
    axes[0].legend(fontsize=8, frameon=False)
    axes[0].set_ylabel("share of the split")
    _resolutions(axes[-2], counted)
    _sources(axes[-1], counted)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out, dpi=150)
    pyplot.close(figure)


def _histogram(axis: Any, by_split: dict[str, Counter[int]]) -> None:
    import numpy as np

    values = sorted({value for counts in by_split.values() for value in counts})
    if not values:
        return
    few = len(values) <= FEW and values[-1] - values[0] <= FEW
    edges = np.arange(values[0], values[-1] + 2) - 0.5 if few else np.histogram_bin_edges(values, BINS)
    for colour, (split, counts) in zip(COLOURS, by_split.items(), strict=False):
        if not counts:
            continue
        lengths, numbers = list(counts), np.array(list(counts.values()), float)
        axis.hist(lengths, edges, weights=numbers / numbers.sum(), histtype="step", color=colour, label=split)
    if few:
        axis.set_xticks(range(values[0], values[-1] + 1))


def _resolutions(axis: Any, counted: Counted) -> None:
    axis.set_title("image size (pixels)")
    axis.set_xlabel("width")
    axis.set_ylabel("height")
    for colour, counts in zip(COLOURS, counted.splits.values(), strict=False):
        if counts.sizes:
            widths, heights = zip(*counts.sizes, strict=True)
            most = max(counts.sizes.values())
            areas = [4 + 60 * number / most for number in counts.sizes.values()]
            axis.scatter(widths, heights, areas, color=colour, alpha=0.4, linewidths=0)


def _sources(axis: Any, counted: Counted) -> None:
    axis.set_title("samples per source")
    total: Counter[str] = Counter()
    for counts in counted.splits.values():
        total.update(counts.sources)
    shown = total.most_common(SOURCES_SHOWN)[::-1]
    axis.barh([name for name, _ in shown], [number for _, number in shown], color=COLOURS[0])
    axis.tick_params(axis="y", labelsize=7)
    axis.locator_params(axis="x", nbins=4)
