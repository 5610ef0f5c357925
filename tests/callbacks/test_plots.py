"""Curves drawn from metrics.jsonl."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nemo_pre.plots import _moving_mean, plot_run, plot_runs
from nemo_pre.run_files.metrics import METRICS, MetricsFile


def record_run(directory: Path, pre: bool, steps: int = 120) -> Path:
    file = MetricsFile(directory / METRICS)
    for step in range(1, steps + 1):
        metrics = {"lm/loss": 4 * math.exp(-step / 40) + 0.2 * math.sin(step)}
        if pre:
            metrics["pre/cosine"] = 1 - math.exp(-step / 30)
        file.append(step, metrics)
        if step % 40 == 0:
            kinds = {f"val/exact_match/{kind}": step / 200 for kind in ("count", "read")}
            file.append(step, {"val/lm_loss": 3.0 - step / 60, "val/exact_match": step / 210, **kinds})
    return directory


def test_a_run_and_a_comparison_are_drawn(tmp_path: Path) -> None:
    from PIL import Image

    with_pre, without = record_run(tmp_path / "pre", True), record_run(tmp_path / "plain", False)
    one = plot_run(with_pre)
    assert one == with_pre / "curves.png"
    both = plot_runs({"PRe": with_pre, "plain": without}, tmp_path / "both.png")
    plain = plot_run(without)
    with Image.open(one) as three_panels, Image.open(plain) as two_panels, Image.open(both) as compared:
        assert three_panels.width == compared.width > two_panels.width  # a panel without data is not drawn


def test_lavers_terms_and_the_similarity_of_layers_get_panels_of_their_own(tmp_path: Path) -> None:
    from PIL import Image

    plain, laver = record_run(tmp_path / "plain", False), record_run(tmp_path / "laver", False)
    file = MetricsFile(laver / METRICS)
    for step in range(121, 130):
        file.append(step, {"laver/mim": 3.0, "laver/gram": 0.01, "laver/similarity": 0.4})
        file.append(step, {f"similarity/layer_{layer}": 0.1 * layer for layer in range(9)})
    with Image.open(plot_run(plain)) as two, Image.open(plot_run(laver)) as five:
        assert five.width > 2 * two.width


def test_the_moving_mean_by_hand() -> None:
    assert _moving_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_a_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path} has no metrics.jsonl"):
        plot_run(tmp_path)
    (tmp_path / METRICS).write_text("")
    with pytest.raises(ValueError, match="no metrics yet"):
        plot_run(tmp_path)
