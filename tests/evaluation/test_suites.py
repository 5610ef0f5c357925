"""Suites, published numbers and the table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_pre.evaluation.published import published_row, published_rows
from nemo_pre.evaluation.results import TaskResult, markdown, table_rows
from nemo_pre.evaluation.suites import BENCHMARKS, SUITES, suite_tasks
from tests.evaluation.real_harness import REAL, needs_lmms_eval


def test_a_suite_runs_a_task_once_though_two_numbers_come_from_it():
    tasks = suite_tasks("pre")
    assert tasks.count("pope") == 1
    assert tasks[:3] == ["gqa", "mmmu_val", "ai2d"]
    assert {"cv_bench_2d", "ocrbench", "chartqa"} <= set(suite_tasks("laver"))


def test_an_unknown_suite_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="suite=all is unknown: choose one of pre, laver, digits"):
        suite_tasks("all")


@pytest.mark.parametrize(
    ("row", "benchmark", "baseline", "regularized"),
    [
        ("pre_clip_frozen_vicuna_7b", "gqa", 62.0, 62.7),
        ("pre_clip_frozen_vicuna_7b", "pope_f1", 85.8, 85.8),
        ("pre_siglip2_qwen25_7b", "ocrbench", 413, 428),
        ("pre_clip_frozen_qwen25_3b", "sqa_image", 71.9, 72.5),
        ("pre_clip_qwen25_3b", "mmbench_en", 70.1, 68.3),
        ("pre_siglip2_naflex_qwen25_3b", "realworldqa", 51.4, 53.3),
        ("laver_siglip2_qwen25_7b", "mmvp", 43.52, 50.24),
    ],
)
def test_published_numbers_are_the_printed_ones(row, benchmark, baseline, regularized):
    found = published_rows()[row]
    assert (found.baseline[benchmark], found.regularized[benchmark]) == (baseline, regularized)


def test_published_numbers_are_in_the_scale_the_table_prints():
    """A fraction among per cents, or a percentage among OCRBench's thousands, would stand out by a factor."""
    for row in published_rows().values():
        for name, value in {**row.baseline, **row.regularized}.items():
            low, high = {"ocrbench": (200, 1000), "mme": (1000, 2000)}.get(name, (20, 100))
            assert low <= value <= high, (row.name, name)


def test_a_suite_is_compared_with_its_paper_and_an_unknown_row_is_refused():
    assert published_row(None, "pre").paper == "PRe"
    assert published_row(None, "laver").paper == "LaVer"
    assert published_row(None, "digits") is None
    with pytest.raises(ValueError, match="published=mine is unknown"):
        published_row("mine", "pre")


def test_the_table_shows_ours_in_the_papers_scale_beside_theirs():
    results = [
        TaskResult("gqa", {}, {"exact_match,none": 0.6213}, {"exact_match,none": 12578}),
        TaskResult("ocrbench", {}, {"ocrbench_accuracy,none": 0.318}, {"ocrbench_accuracy,none": 1000}),
        TaskResult("mme", {}, {"mme_perception_score,none": 1510.7}, {"mme_perception_score,none": 2114}),
        TaskResult("mmvp", {}, {}, {}, note="skipped: MMVP is not here"),
    ]
    row = published_row(None, "pre")
    text = markdown(table_rows(results, "pre", row), Path("model"), row, ["One remark."])
    assert "| benchmark | metric | ours | n | PRe's baseline | + PRe | note |" in text
    assert "| GQA | exact_match | 62.13 | 12578 | 62 | 62.7 |  |" in text
    assert "| OCRBench | ocrbench_accuracy | 318 | 1000 | 318 | 329 |  |" in text
    assert "| MME perception | mme_perception_score | 1510.7 | 2114 | 1510.7 | 1528.3 |  |" in text
    assert "| MMVP | mmvp_pair_accuracy | – | – | 20 | 22 | skipped: MMVP is not here |" in text
    assert text.endswith("One remark.\n")
    assert [line.count("|") for line in text.splitlines() if line.startswith("|")] == [8] * 6


def test_tasks_that_no_paper_prints_show_all_their_numbers():
    results = [TaskResult("vqav2", {}, {"exact_match,none": 0.5, "other,none": 7.0}, {"exact_match,none": 4})]
    rows = table_rows(results, None, None)
    assert [(row.metric, row.ours, row.questions) for row in rows] == [
        ("exact_match,none", 0.5, 4),
        ("other,none", 7.0, None),
    ]


PROGRAM = """
import sys
from lmms_eval.tasks import TaskManager
from lmms_eval.utils import load_yaml_config
index = TaskManager("ERROR").task_index
for pair in sys.argv[1:]:
    task, metric = pair.split(":")
    config = load_yaml_config(index[task]["yaml_path"], mode="simple") if task in index else {"metric_list": []}
    name, _, filters = metric.partition(",")
    known = [entry["metric"] for entry in config["metric_list"]]
    filters_known = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
    if name not in known or filters not in filters_known:
        print("unknown:", pair, known, filters_known)
"""


@needs_lmms_eval
def test_every_benchmark_is_a_task_and_a_metric_of_the_installed_lmms_eval():
    pairs = [f"{each.task}:{each.metric}" for each in BENCHMARKS.values() if each.name not in SUITES["digits"]]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [REAL or sys.executable, "-c", PROGRAM, *pairs], capture_output=True, text=True, check=True, env=environment
    )
    assert [line for line in done.stdout.splitlines() if line.startswith("unknown:")] == []
