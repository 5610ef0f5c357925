"""Comparing runs: grouping, the table, files, and runs that are damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemo_pre.report.arms import arrange, option_differences
from nemo_pre.report.compare import compare
from nemo_pre.run_files.metrics import METRICS
from tests.report.recorded import final, record_run


@pytest.fixture
def four(tmp_path: Path) -> list[str]:
    """Two arms of two seeds each."""
    plain = [record_run(tmp_path / f"plain_{seed}", final(lm__loss=1.0 + seed), seed) for seed in (1, 2)]
    pre = [
        record_run(tmp_path / f"pre_{seed}", final(lm__loss=0.8 + 1.2 * seed), seed, objective__pre__enabled=True)
        for seed in (1, 2)
    ]
    return [str(plain[0]), str(pre[0]), str(pre[1]), str(plain[1])]


def test_runs_that_differ_only_in_seed_are_one_arm(four: list[str]) -> None:
    arms = arrange(four)
    assert [(arm.label, [run.directory.name for run in arm.runs]) for arm in arms] == [
        ("plain", ["plain_1", "plain_2"]),
        ("pre", ["pre_1", "pre_2"]),
    ]
    found = option_differences(arms)
    assert [(one.option, one.values) for one in found] == [("objective.pre.enabled", ["false", "true"])]


def test_an_option_younger_than_a_run_counts_with_its_default(tmp_path: Path) -> None:
    old = record_run(tmp_path / "a_1", final(lm__loss=1), 1)
    same = record_run(tmp_path / "a_2", final(lm__loss=1), 2, objective__laver__mask_token="learned")
    other = record_run(tmp_path / "b_1", final(lm__loss=1), 1, objective__laver__mask_token="embedding")
    assert [len(arm.runs) for arm in arrange([str(old), str(same), str(other)])] == [2, 1]


def test_commas_put_runs_together_whatever_their_options(four: list[str]) -> None:
    arms = arrange([f"{four[0]},{four[1]}", four[2]], ["mixed", "rest"])
    assert [(arm.label, len(arm.runs)) for arm in arms] == [("mixed", 2), ("rest", 1)]
    assert [(one.option, one.values) for one in option_differences(arms)] == [
        ("objective.pre.enabled", ["false or true", "true"])
    ]


def test_runs_without_a_config_stand_alone_and_are_not_paired(tmp_path: Path) -> None:
    runs = [
        str(record_run(tmp_path / name, final(lm__loss=1.0 + len(name)), seed=None)) for name in ["a", "bb", "ccc"]
    ]
    comparison = compare(runs, out=str(tmp_path / "out"))
    assert [arm.label for arm in comparison.arms] == ["a", "bb", "ccc"]
    assert any("bb: There is no config.yaml" in note for note in comparison.notes)
    last = record_run(tmp_path / "d", final(lm__loss=4), 1)
    together = compare([f"{runs[0]},{runs[1]}", f"{runs[2]},{last}"], out=str(tmp_path / "out"))
    change = together.rows[0].cells[1].difference
    assert change is not None and change.method == "Welch"


def test_the_table_holds_means_intervals_and_paired_differences(four: list[str], tmp_path: Path) -> None:
    comparison = compare(four, out=str(tmp_path / "out"))
    (row,) = comparison.rows
    plain, pre = row.cells
    assert plain.estimate is not None and pre.estimate is not None and pre.difference is not None
    assert plain.estimate.value == pytest.approx(2.5) and pre.estimate.value == pytest.approx(2.6)
    # differences 0.0 and 0.2: mean 0.1, standard error 0.1, t(0.975, 1) = 12.7062
    change = pre.difference.estimate
    assert (change.value, change.low, change.high) == pytest.approx((0.1, 0.1 - 1.27062, 0.1 + 1.27062), abs=1e-5)
    text = comparison.text()
    assert "lm/loss, step 10" in text and "+0.1  [-1.171, +1.371]  paired t" in text
    assert "objective.pre.enabled: false | true" in text
    written = tmp_path / "out"
    table = (written / "comparison.md").read_text()
    assert "| lm/loss | 10 | plain | 2 | 2.5 |" in table and "| objective.pre.enabled | false | true |" in table
    data = json.loads((written / "comparison.json").read_text())
    assert data["metrics"][0]["arms"][1]["difference"]["method"] == "paired t"
    assert data["arms"][0]["runs"][1]["seed"] == [2, 2]


def test_a_single_run_has_no_interval_and_says_so(four: list[str], tmp_path: Path) -> None:
    comparison = compare(four[:2], out=str(tmp_path))
    assert "none (n=1)" in comparison.text() and "single runs" in comparison.text()
    assert any("plain_1: one run (n=1), so there is no interval" in note for note in comparison.notes)


def test_the_curves_of_arms_are_drawn_panel_by_panel(tmp_path: Path) -> None:
    from PIL import Image

    def steps(shift: float) -> dict[int, dict[str, float]]:
        curve = {step: {"lm/loss": shift + math.exp(-step / 20), "pre/cosine": math.nan} for step in range(1, 61)}
        return {**curve, 60: {**curve[60], "val/lm_loss": shift}}

    runs = [str(record_run(tmp_path / f"a_{seed}", steps(0.01 * seed), seed)) for seed in (1, 2, 3)]
    runs.append(str(record_run(tmp_path / "b", steps(0.5), 1, optim__lr=0.1)))
    compare(runs, out=str(tmp_path / "one"), metrics="lm/loss")
    compare(runs, out=str(tmp_path / "three"))
    with Image.open(tmp_path / "one" / "comparison.png") as one:
        with Image.open(tmp_path / "three" / "comparison.png") as three:
            assert three.width > 1.5 * one.width and three.height >= one.height
            assert len(three.convert("RGB").getcolors(1 << 20)) > 50


def test_runs_of_different_length_are_compared_at_the_last_common_step(tmp_path: Path) -> None:
    long = record_run(tmp_path / "long", {step: {"lm/loss": 1.0 * step} for step in (2, 4, 6, 8)}, 1)
    short = record_run(tmp_path / "short", {step: {"lm/loss": 2.0 * step} for step in (1, 4, 5, 6)}, 1, optim__lr=0.1)
    comparison = compare([str(long), str(short)], out=str(tmp_path))
    (row,) = comparison.rows
    assert row.step == 6
    assert [cell.estimate.value for cell in row.cells if cell.estimate] == [6.0, 12.0]
    assert any(f"{long} 8, {short} 6" in note for note in comparison.notes)
    (mean,) = compare([str(long), str(short)], out=str(tmp_path), average_last=2).rows
    assert [cell.estimate.value for cell in mean.cells if cell.estimate] == [5.0, 10.0]  # of steps 4 and 6


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    one = record_run(tmp_path / "one", {1: {"lm/loss": 1, "val/lm_loss": 1}, 2: {"lm/loss": 1, "laver/mim": 3}}, 1)
    other = record_run(tmp_path / "other", {2: {"lm/loss": 2, "val/lm_loss": 3}}, 1, optim__lr=0.1)
    comparison = compare([str(one), str(other)], out=str(tmp_path))
    by_name = {row.metric: row for row in comparison.rows}
    assert by_name["val/lm_loss"].step is None
    assert by_name["laver/mim"].cells[1].estimate is None
    assert any("val/lm_loss: the runs that record it have no step in common" in note for note in comparison.notes)
    assert "laver/mim: not recorded by other." in comparison.notes
    assert "val/lm_loss, no common step" in comparison.text()


def test_a_value_that_is_not_finite_spoils_its_arm_and_is_said(four: list[str], tmp_path: Path) -> None:
    broken = record_run(tmp_path / "plain_3", {8: {"lm/loss": 1.0}, 10: {"lm/loss": math.nan}}, 3)
    comparison = compare([*four, str(broken)], out=str(tmp_path))
    assert "none (not finite)" in comparison.text()
    assert any("lm/loss is not finite in 1 of 2 records, first at step 10" in note for note in comparison.notes)
    data = json.loads((tmp_path / "comparison.json").read_text())
    assert data["metrics"][0]["arms"][0]["mean"]["value"] is None


def test_a_killed_run_keeps_its_whole_lines(four: list[str], tmp_path: Path) -> None:
    with (Path(four[0]) / METRICS).open("a") as file:
        file.write('{"step": 12, "lm/lo')
    comparison = compare(four, out=str(tmp_path))
    assert comparison.rows[0].step == 10
    assert [note for note in comparison.notes if "1 torn line(s)" in note and "plain_1" in note]


@pytest.mark.parametrize("content, complaint", [("", "no metrics yet"), ('{"step": 1, "lm', "none can be read")])
def test_a_record_without_a_whole_line_is_refused(
    four: list[str], tmp_path: Path, content: str, complaint: str
) -> None:
    (Path(four[1]) / METRICS).write_text(content)
    with pytest.raises(ValueError, match=f"pre_1/metrics.jsonl has .*{complaint}"):
        compare(four, out=str(tmp_path))


def test_wrong_input_is_named(four: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere has no metrics.jsonl"):
        compare([four[0], "nowhere"], out=str(tmp_path))
    with pytest.raises(ValueError, match="plain_1 is given twice"):
        compare([four[0], four[0] + "/"], out=str(tmp_path))
    with pytest.raises(ValueError, match="one arm only"):
        compare([four[0], four[3]], out=str(tmp_path))
    with pytest.raises(ValueError, match="metrics=accuracy fits nothing in these runs: they record lm/loss"):
        compare(four, out=str(tmp_path), metrics="accuracy")
    with pytest.raises(ValueError, match="labels has 1 names for 2 arms"):
        compare(four, out=str(tmp_path), labels="PRe")
    with pytest.raises(ValueError, match="average_last=0"):
        compare(four, out=str(tmp_path), average_last=0)
    (Path(four[2]) / "config.yaml").write_text("seed: [1")
    with pytest.raises(ValueError, match="pre_2/config.yaml cannot be read"):
        compare(four, out=str(tmp_path))


def test_metrics_are_chosen_by_pattern_and_sorted_by_number(tmp_path: Path) -> None:
    values = {f"similarity/layer_{layer}": 0.1 for layer in (10, 2, 1)} | {"lm/loss": 1.0}
    runs = [str(record_run(tmp_path / name, {10: values}, 1, optim__lr=lr)) for name, lr in (("a", 0.1), ("b", 0.2))]
    comparison = compare(runs, out=str(tmp_path), metrics="similarity/*, lm/loss")
    assert [row.metric for row in comparison.rows] == [*(f"similarity/layer_{n}" for n in (1, 2, 10)), "lm/loss"]
