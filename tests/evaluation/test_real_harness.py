"""With the real lmms-eval: from an exported directory to a table, offline."""

import json
import sys

import pytest

from nemo_pre.evaluation.evaluate import evaluate
from tests.evaluation.real_harness import REAL, needs_lmms_eval

pytestmark = [needs_lmms_eval, pytest.mark.timeout(900)]


def test_an_exported_model_answers_the_digits(tiny_model, digits, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    asked = {"tasks": "digits", "data": str(digits), "out": str(out), "limit": 8, "batch_size": 3, "python": REAL}
    (result,) = evaluate(str(tiny_model), **asked)
    assert result.counts["exact_match,none"] == 8
    (samples,) = out.glob("digits/*/*_samples_digits.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    assert len(rows) == 8
    kinds = [name for row in rows for name in row if name.startswith("exact_match_")]
    for kind in set(kinds):
        assert result.counts[f"{kind},none"] == kinds.count(kind)
    assert (
        f"| digits | exact_match | {100 * result.metrics['exact_match,none']:g} | 8 |"
        in (out / "table.md").read_text()
    )
    table = (out / "table.md").stat().st_mtime_ns
    assert evaluate(str(tiny_model), **asked) == [result]  # at once: nothing is run again
    assert (out / "table.md").stat().st_mtime_ns > table
    assert len(list(out.glob("digits/*/*_results.json"))) == 1


def test_the_first_tasks_of_the_pre_suite_lack_their_data_and_say_so(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="14 of 14 tasks lack their data"):
        evaluate(str(tiny_model), suite="pre", out=str(tmp_path / "out"), python=REAL)
    said = capsys.readouterr().err
    assert (
        "gqa: lmms-lab-encoder/GQA (testdev_balanced_instructions), lmms-lab-encoder/GQA (testdev_balanced_images)"
        in said
    )
    assert "mmbench_en_dev, mmbench_cn_dev: a language model judges" in said
    assert not list((tmp_path / "out").glob("*"))


LIKELIHOOD_TASK = """
task: which_digit
test_split: val
dataset_path: parquet
dataset_kwargs: {{data_files: {{val: {file}}}}}
output_type: multiple_choice
doc_to_visual: image
doc_to_text: question
doc_to_target: target
doc_to_choice: ["yes", "no"]
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_likelihoods_pass_through_lmms_eval(tiny_model, tmp_path, monkeypatch):
    """A model whose answers do not depend on the question prefers the same choice always."""
    from datasets import Dataset, Features, Image, Value
    from PIL import Image as Pictures

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "task"
    folder.mkdir()
    rows = [
        {"image": Pictures.new("RGB", (20, 20)), "question": "is it so?", "target": number % 2} for number in range(4)
    ]
    features = Features({"image": Image(), "question": Value("string"), "target": Value("int64")})
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "val.parquet"))
    (folder / "which_digit.yaml").write_text(LIKELIHOOD_TASK.format(file=folder / "val.parquet"))
    from nemo_pre.evaluation.harness import Harness, run_task
    from nemo_pre.evaluation.results import read_results

    file = run_task(Harness(python=REAL or sys.executable), tiny_model, "which_digit", tmp_path / "out", folder)
    assert read_results(file, "which_digit", {}, 0.0).metrics["acc,none"] == 0.5
