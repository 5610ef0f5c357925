"""The whole command with a fake lmms-eval in the place of the real one."""

import json
import sys

import pytest

from nemo_pre.cli import options
from nemo_pre.evaluation.evaluate import evaluate
from nemo_pre.evaluation.harness import Harness, command, version


def calls(log) -> list[dict]:
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def value(argv, name):
    return argv[argv.index(name) + 1]


def test_each_task_runs_once_in_its_own_process_with_our_adapter(tiny_model, fake_harness, cached_data, tmp_path):
    cached_data()
    evaluate(str(tiny_model), tasks="gqa,pope", out=str(tmp_path / "out"), batch_size=8, device="cpu", limit=3)
    ran = calls(fake_harness)
    assert [value(call["argv"], "--tasks") for call in ran] == ["gqa", "pope"]
    for call in ran:
        assert value(call["argv"], "--model") == "exported_vlm"
        assert value(call["argv"], "--model_args") == f"pretrained={tiny_model.resolve()}"
        assert value(call["argv"], "--batch_size") == "8"
        assert value(call["argv"], "--device") == "cpu"
        assert value(call["argv"], "--limit") == "3"
        assert "--log_samples" in call["argv"]
        assert call["offline"] == "1"
        assert call["cwd"].startswith(str(tmp_path / "out"))  # where some tasks leave files


def test_the_table_and_the_json_hold_every_number(tiny_model, fake_harness, cached_data, tmp_path):
    cached_data()
    evaluate(str(tiny_model), tasks="gqa,pope", out=str(tmp_path / "out"), published="pre_clip_qwen25_3b")
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| GQA | exact_match | 50 | 2 | 61 | 60.9 |  |" in table  # two of three samples enter this metric
    assert "| POPE F1 | pope_f1_score | 50 | 3 | 86.3 | 87.8 |  |" in table
    summary = json.loads((tmp_path / "out" / "results.json").read_text())
    assert summary["lmms_eval"] == "0.7.3"
    assert [row["label"] for row in summary["rows"]] == ["GQA", "POPE accuracy", "POPE F1"]


def test_finished_tasks_are_not_run_again_unless_asked_or_changed(tiny_model, fake_harness, cached_data, tmp_path):
    cached_data()
    where = {"out": str(tmp_path / "out")}
    evaluate(str(tiny_model), tasks="gqa", **where)
    evaluate(str(tiny_model), tasks="gqa,pope", batch_size=16, **where)  # the batch size changes no score
    assert [value(call["argv"], "--tasks") for call in calls(fake_harness)] == ["gqa", "pope"]
    evaluate(str(tiny_model), tasks="gqa", limit=2, **where)
    evaluate(str(tiny_model), tasks="gqa", limit=2, again=True, **where)
    assert len(calls(fake_harness)) == 4


def test_another_model_of_the_same_sizes_is_evaluated_afresh(tiny_model, fake_harness, cached_data, tmp_path):
    import shutil

    cached_data()
    other = shutil.copytree(tiny_model, tmp_path / "other")
    evaluate(str(tiny_model), tasks="gqa", out=str(tmp_path / "out"))
    evaluate(str(other), tasks="gqa", out=str(tmp_path / "out"))
    assert len(calls(fake_harness)) == 1  # a copy is the same model
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-8:] = bytes(8)
    weights.write_bytes(content)
    evaluate(str(other), tasks="gqa", out=str(tmp_path / "out"))
    assert len(calls(fake_harness)) == 2


def test_missing_data_are_refused_before_anything_loads(tiny_model, fake_harness, cached_data, tmp_path, capsys):
    cached_data("GQA/questions", "POPE/default")
    with pytest.raises(ValueError, match="1 of 2 tasks lack their data"):
        evaluate(str(tiny_model), tasks="gqa,pope", out=str(tmp_path / "out"))
    assert calls(fake_harness) == []
    said = capsys.readouterr().err
    assert "gqa: lmms-lab-encoder/GQA (pictures)" in said  # the images that the task's code fetches
    assert "load_dataset('lmms-lab-encoder/GQA', 'pictures')" in said
    assert str(tmp_path / "cache") in said
    assert "(questions)" not in said


def test_missing_data_are_skipped_and_counted_if_asked(tiny_model, fake_harness, cached_data, tmp_path):
    cached_data("POPE/default")
    results = evaluate(str(tiny_model), tasks="gqa,pope", missing="skip", out=str(tmp_path / "out"))
    assert [result.task for result in results if result.metrics] == ["pope"]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "Left out for lack of data: 1 (gqa)." in table
    cached_data("GQA/questions", "GQA/pictures")
    evaluate(str(tiny_model), tasks="gqa,pope", missing="skip", out=str(tmp_path / "out"))
    assert [value(call["argv"], "--tasks") for call in calls(fake_harness)] == ["pope", "gqa"]


def test_an_unfinished_download_is_missing(tiny_model, fake_harness, cached_data, tmp_path):
    cached_data("POPE/default")
    folder = tmp_path / "cache" / "lmms-lab-encoder___pope" / "default" / "0.0.0"
    (folder / "abc").rename(folder / "abc.incomplete")
    with pytest.raises(ValueError, match="lack their data"):
        evaluate(str(tiny_model), tasks="pope", out=str(tmp_path / "out"))


def test_missing_data_are_downloaded_only_if_asked(tiny_model, fake_harness, tmp_path):
    evaluate(str(tiny_model), tasks="pope", missing="download", out=str(tmp_path / "out"))
    assert calls(fake_harness)[0]["offline"] == "0"


def test_groups_need_the_data_of_their_members(tiny_model, fake_harness, cached_data, tmp_path, capsys):
    cached_data("MME/default")
    with pytest.raises(ValueError, match="lack their data"):
        evaluate(str(tiny_model), tasks="yes_or_no", out=str(tmp_path / "out"))
    assert "yes_or_no: lmms-lab-encoder/POPE\n" in capsys.readouterr().err


def test_a_task_that_a_language_model_judges_is_said_so(tiny_model, fake_harness, cached_data, tmp_path, capsys):
    cached_data()
    evaluate(str(tiny_model), tasks="judged,mme", out=str(tmp_path / "out"))
    said = capsys.readouterr()
    assert "judged: a language model judges" in said.err
    assert "Judged by a language model: judged." in said.out


def test_a_failed_task_is_named_and_costs_no_other(tiny_model, fake_harness, cached_data, tmp_path, monkeypatch):
    cached_data()
    monkeypatch.setenv("FAKE_HARNESS_FAILS", "gqa")
    with pytest.raises(ValueError, match="1 of 2 tasks failed: gqa ended without results: RuntimeError: out of paper"):
        evaluate(str(tiny_model), tasks="gqa,pope", out=str(tmp_path / "out"))
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| GQA | exact_match | – | – | failed" in table
    assert "| POPE F1 | pope_f1_score | 50 | 3 |" in table
    monkeypatch.delenv("FAKE_HARNESS_FAILS")
    evaluate(str(tiny_model), tasks="gqa,pope", out=str(tmp_path / "out"))
    assert [value(call["argv"], "--tasks") for call in calls(fake_harness)] == ["gqa", "pope", "gqa"]


def test_an_unknown_task_is_refused(tiny_model, fake_harness, tmp_path):
    with pytest.raises(ValueError, match="lmms-eval 0.7.3 has no task gqqa"):
        evaluate(str(tiny_model), tasks="gqqa", out=str(tmp_path / "out"))


def test_an_lmms_eval_without_tasks_is_refused(tiny_model, fake_harness, tmp_path, monkeypatch):
    """As the wheel of 0.7 is."""
    package = tmp_path / "site" / "lmms_eval" / "tasks"
    assert package.is_dir()
    bare = tmp_path / "bare"
    (bare / "lmms_eval" / "tasks").mkdir(parents=True)
    (bare / "lmms_eval" / "__init__.py").touch()
    (bare / "lmms_eval" / "tasks" / "__init__.py").write_text((package / "__init__.py").read_text())
    monkeypatch.setenv("PYTHONPATH", f"{bare}:{tmp_path / 'site'}")
    with pytest.raises(
        ValueError, match=r"knows no tasks: pip install 'nemo-pre\[eval\]' \(lmms-eval 0.7.3 or newer\)"
    ):
        evaluate(str(tiny_model), tasks="gqa", out=str(tmp_path / "out"))


def test_an_interpreter_without_lmms_eval_is_told_what_to_install(tmp_path):
    without = tmp_path / "python"
    without.write_text("#!/bin/sh\necho PackageNotFoundError >&2\nexit 1\n")
    without.chmod(0o755)
    with pytest.raises(ValueError, match=r"has no lmms-eval: pip install 'nemo-pre\[eval\]'"):
        version(Harness(python=str(without)))
    with pytest.raises(ValueError, match="nowhere does not run"):
        version(Harness(python=str(tmp_path / "nowhere")))


def test_flags_go_to_lmms_eval_unless_they_contradict_ours(tiny_model, tmp_path):
    harness = Harness(flags="--gen_kwargs temperature=0.2 --seed 3", num_fewshot=2)
    words = command(harness, tiny_model, "gqa", tmp_path, None)
    assert words[-4:] == ["--gen_kwargs", "temperature=0.2", "--seed", "3"]
    assert value(words, "--num_fewshot") == "2"
    assert words[:3] == [sys.executable, "-m", "lmms_eval"]
    with pytest.raises(ValueError, match="flags may not hold --tasks"):
        Harness(flags="--tasks=pope")
    with pytest.raises(ValueError, match="flags may not hold -b: give batch_size=VALUE instead"):
        Harness(flags="-b 3")


def test_several_processes_start_with_torchrun(tiny_model, tmp_path):
    words = command(Harness(processes=4), tiny_model, "gqa", tmp_path, None)
    assert words[1:3] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=4" in words
    assert words[words.index("lmms_eval") - 1] == "-m"


def test_what_is_not_an_exported_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not an exported model"):
        evaluate(str(tmp_path))


def test_the_command_line_converts_every_option():
    given = options(evaluate, ["model=x", "limit=8", "again=true", "device=null", "flags=--seed 1"], "evaluate", {})
    assert given == {"model": "x", "limit": 8, "again": True, "device": None, "flags": "--seed 1"}
    assert options(evaluate, ["model=x", "limit=0.5"], "evaluate", {})["limit"] == 0.5
