"""A study's runs: which, in what order, done once, resumed, and told with intervals."""

from __future__ import annotations

import json
import os
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from nemo_pre.launch.ranks import RankFailure
from nemo_pre.study import runs as study_runs
from nemo_pre.study.arms import digits_arms, first_stages
from nemo_pre.study.digits import study
from nemo_pre.study.runs import StudyRun
from nemo_pre.study.schedule import Clock, Turns, alone
from tests.cli.in_a_rank import command_line
from tests.study.processes import Processes


@pytest.fixture
def processes(monkeypatch) -> Processes:
    found = Processes()
    found.stand_in(monkeypatch)
    return found


@pytest.fixture
def ask(digits, tmp_path, processes):
    def asked(*options: str, **more: Any) -> dict[str, Any]:
        how = {
            "seeds": 2,
            "encoder_steps": 0,
            "first_steps": 2,
            "steps": 2,
            "num_images": 8,
            "num_fit": 8,
            "val_samples": 4,
        }
        places = {
            "out": str(tmp_path / "out"),
            "page": str(tmp_path / "docs/study.md"),
            "runs": str(tmp_path / "runs"),
        }
        study(options, data=str(digits), platform="cpu", **{**how, **places, "at_a_time": 2, **more})
        return json.loads((tmp_path / "out" / "summary.json").read_text())

    return asked


def test_a_first_stage_is_trained_once_and_before_what_starts_from_it(ask, processes, tmp_path):
    ask(arms="baseline,pre,laver", at_a_time=1)
    trained = [name for verb, name in processes.verbs() if verb == "train"]
    assert trained == [
        f"{name}_seed{seed}"
        for names in (("first_causal", "first_mixed_2d"), ("baseline", "pre", "laver"))
        for seed in (1, 2)
        for name in names
    ]
    of_laver = next(words for verb, *words in processes.commands if verb == "train" and "laver_seed2" in words[-1])
    assert f"init_from={tmp_path / 'runs' / 'first_mixed_2d_seed2' / 'checkpoints'}" in of_laver
    assert "optim.freeze_vision=true" in of_laver and "seed=2" in of_laver


def test_what_is_finished_is_not_repeated_and_what_was_killed_is_started_again_as_it_was(ask, processes, tmp_path):
    ask(arms="baseline")
    first = list(processes.commands)
    (tmp_path / "runs" / "baseline_seed1" / "trained.json").unlink()  # killed while it trained
    (tmp_path / "runs" / "baseline_seed2" / "diagnosed.json").unlink()  # and while it was diagnosed
    processes.commands.clear()
    ask(arms="baseline", at_a_time=1)
    assert processes.verbs() == [
        ("train", "baseline_seed1"),
        ("diagnose", "baseline_seed1"),
        ("diagnose", "baseline_seed2"),
    ]
    assert processes.commands[0] in first
    processes.commands.clear()
    for marker in (tmp_path / "runs").rglob("diagnosed.json"):
        os.utime(marker, (86400, 86400))
    assert ask(arms="baseline")["date"] == "1970-01-02"  # when it was measured, not when it was told
    assert processes.commands == []


def test_other_options_do_not_continue_a_run(ask, tmp_path):
    ask(arms="baseline")
    with pytest.raises(ValueError, match=r"holds a run with other options \(.*trainer.max_steps=3"):
        ask(arms="baseline", steps=3, out=str(tmp_path / "other"))


def test_a_summary_is_not_written_over_by_one_that_lacks_its_numbers(ask, processes, tmp_path):
    ask(arms="baseline,pre")
    summary = tmp_path / "out" / "summary.json"
    held = summary.read_bytes()
    processes.commands.clear()
    for options, told in (
        ({"arms": "baseline,pre", "steps": 3}, r"other settings \(steps 2, here 3\)"),
        ({"arms": "pre"}, r"not asked for \(baseline seed 1, baseline seed 2\)"),
        ({"arms": "baseline,pre", "seeds": 1}, r"\(baseline seed 2, first_causal seed 2, pre seed 2\)"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(**options)
    assert summary.read_bytes() == held and not processes.commands
    assert set(ask(arms="baseline,pre,laver")["arms"]) > {"baseline", "pre", "laver"}
    summary.write_text("{}")
    with pytest.raises(ValueError, match="is no summary of this study"):
        ask(arms="baseline,pre,laver")


def test_a_failed_run_is_told_at_once_and_left_out_and_the_others_go_on(ask, processes, tmp_path, capsys):
    processes.failing = {"first_mixed_2d_seed1"}
    with pytest.raises(
        RankFailure, match="2 of 8 runs failed: first_mixed_2d, seed 1: nemo-pre train ended with code 1"
    ):
        ask(arms="baseline,laver")
    told = capsys.readouterr().err
    assert "first_mixed_2d, seed 1: nemo-pre train ended with code 1" in told
    assert "laver, seed 1: not started, since its first stage failed." in told
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [len(arm["seeds"]) for arm in summary["arms"].values()] == [2, 1, 2, 1]
    processes.failing = set()
    assert len(ask(arms="baseline,laver")["arms"]["laver"]["seeds"]) == 2


def test_numbers_are_means_with_intervals_and_differences_are_paired_by_seed(ask):
    arms = ask(arms="baseline,pre,mixed_2d,mim", seeds=3)["arms"]
    baseline = arms["baseline"]["metrics"]
    assert baseline["exact_match"]["value"] == pytest.approx(0.302) and baseline["exact_match"]["n"] == 3
    assert baseline["exact_match"]["low"] < 0.302 < baseline["exact_match"]["high"]
    assert baseline["probe_count@middle"]["value"] == pytest.approx(0.6 - 0.08 + 0.008)
    assert baseline["probe_count change@last"]["value"] == pytest.approx(-0.16 + 0.016)
    assert baseline["pairwise_cosine change@middle"]["value"] == pytest.approx(0.4)
    gain = arms["pre"]["against"]["baseline"]
    assert gain["exact_match"]["value"] == pytest.approx(0.1) and gain["exact_match"]["low"] is None  # no spread
    assert gain["loss"]["value"] == pytest.approx(-0.1)
    assert set(arms["mim"]["against"]) == {"mixed_2d", "baseline"}


def test_the_page_answers_each_question_with_its_table_and_takes_up_remarks(ask, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "remarks.md").write_text("Two steps decide nothing.")
    ask(arms="baseline,pre,mixed_2d,mim,mim_ga,laver", seeds=3)
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "Two steps decide nothing." in page
    assert "probe for the count: degrades by the middle layer, degrades by the last layer" in page
    assert "MIM < mixed attention + 2D-RoPE < MIM + Gram-anchoring < MIM + clipped Gram-anchoring (LaVer)" in page
    assert "the published one" in page and "not the published one" not in page
    assert "![measures by layer](../out/layers.png)" in page
    for figure in ("layers.png", "answers.png", "trade_off.png"):
        assert (tmp_path / "out" / figure).stat().st_size > 5_000
    ask(arms="baseline", seeds=1, out=str(tmp_path / "fewer"))
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "Not run: it takes the arms mim, mixed_2d, mim_ga, laver." in page
    assert "not to be judged (one seed)" in page


def test_the_time_left_follows_from_the_steps_done_since_the_start(tmp_path):
    def run(name: str, steps: int, cost: float) -> StudyRun:
        return StudyRun(name, 1, tmp_path / name, (), steps, cost, "data", ())

    one, two = run("one", 100, 1.0), run("two", 100, 2.0)
    (tmp_path / "one").mkdir()
    metrics = tmp_path / "one" / "metrics.jsonl"
    metrics.write_text('{"step": 40}\n')
    turns = Turns([one, two], {})
    clock = Clock(turns, now=0.0)
    assert turns.take() is one
    assert "13%, starting" in clock.line(now=60.0)
    metrics.write_text('{"step": 40}\n{"step": 60}\n')
    assert clock.line(now=60.0) == "0/2 runs, 20%, about 12 min left | one, seed 1 60/100"
    (tmp_path / "one" / "trained.json").write_text(json.dumps({"options": list(one.overrides)}))
    assert clock.line(now=60.0).endswith("one, seed 1 diagnosing")


def test_what_starts_from_a_trained_run_begins_while_that_is_diagnosed_and_nobody_waits_for_a_turn(tmp_path):
    def run(name: str) -> StudyRun:
        return StudyRun(name, 1, tmp_path / name, (), 2, 1.0, "data", ())

    first, second, other, later = runs = [run(name) for name in ("first", "second", "other", "later")]
    turns = Turns(runs, {second: first, later: other})
    assert turns.take() is first
    assert turns.take() is other  # second cannot begin yet, and a worker that waited for it would do nothing
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "trained.json").write_text(json.dumps({"options": []}))
    assert turns.take() is second and not first.is_finished
    turns.end(first, "first, seed 1: its diagnosis failed.")
    turns.end(other, "other, seed 1: its training failed.")
    assert turns.take() is None
    turns.end(second)
    assert turns.failures() == [
        "first, seed 1: its diagnosis failed.",
        "other, seed 1: its training failed.",
        "later, seed 1: not started, since its first stage failed.",
    ]
    assert turns.ended[second] is None


def test_two_studies_do_not_work_in_one_place(tmp_path):
    with alone(tmp_path), pytest.raises(ValueError, match="Another study"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.mark.parametrize("num_layers", [8, 2])
def test_every_arm_is_a_run_that_can_be_checked(num_layers, digits):
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    for arm in [*first_stages(), *digits_arms(num_layers)]:
        options = [*arm.overrides, f"model.language.num_layers={num_layers}", f"data.path={digits}", "platform=cpu"]
        check_options(compose_run(options))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"arms": "baseline,nothing"}, "names no arm 'nothing'"),
        ({"seeds": 0}, "seeds=0"),
        ({"first_steps": -1}, "first_steps=-1"),
        ({"encoder_steps": -1}, "encoder_steps=-1"),
        ({"language_steps": 1, "first_steps": 0}, "language_steps needs an encoder and a first stage"),
        ({"data": "nowhere"}, "nowhere has no manifest"),
    ],
)
def test_wrong_options_are_one_sentence_each(options, told, tmp_path, digits):
    with pytest.raises(ValueError, match=told):
        study(**{"data": str(digits), "runs": str(tmp_path), "platform": "cpu", **options})


def test_a_dry_run_lists_the_runs_and_does_nothing(digits, tmp_path, capsys):
    study(data=str(digits), runs=str(tmp_path / "runs"), dry_run=True, platform="cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 * 3 + 8 + 2 * 3 + 4  # arms, first stages, ablations
    assert not (tmp_path / "runs").exists()


def test_first_stages_start_from_the_frozen_encoder_and_later_ones_from_first_stages(digits, tmp_path, capsys):
    study(data=str(digits), runs=str(tmp_path / "runs"), dry_run=True, platform="cpu", arms="baseline", seeds=2)
    first, _, second, _ = capsys.readouterr().out.splitlines()
    assert f"init_from={tmp_path / 'runs' / 'start_seed1'} optim.freeze_vision=true" in first
    assert f"init_from={tmp_path / 'runs' / 'first_causal_seed1' / 'checkpoints'}" in second
    study(data=str(digits), dry_run=True, platform="cpu", arms="baseline", seeds=1, language_steps=9)
    aligned, tuned = capsys.readouterr().out.splitlines()
    assert "optim.freeze_language=true" in aligned and "freeze_language" not in tuned
    study(data=str(digits), dry_run=True, platform="cpu", arms="baseline", seeds=1, encoder_steps=0)
    random, _ = capsys.readouterr().out.splitlines()
    assert "init_from" not in random and "freeze_vision" not in random


def test_a_real_arm_of_two_steps_is_trained_diagnosed_and_summed_up(digits, tmp_path, monkeypatch):
    """Trained in a process of its own, as study starts it; diagnosed in one that has NeMo already."""
    start = study_runs.subprocess.run

    def start_or_fork(command: list[str], stdout: Any, **options: Any) -> CompletedProcess[str]:
        words = command[command.index("nemo_pre.cli") + 1 :]
        if words[0] == "train":
            return start(command, stdout=stdout, **options)
        code, said = command_line(words)
        stdout.write(said)
        return CompletedProcess(command, code)

    monkeypatch.setattr(study_runs.subprocess, "run", start_or_fork)
    study(
        [
            "model.language.num_layers=2",
            "model.vision.num_layers=1",
            "trainer.global_batch_size=4",
            "trainer.micro_batch_size=4",
        ],
        out=str(tmp_path / "out"),
        page=str(tmp_path / "study.md"),
        runs=str(tmp_path / "runs"),
        data=str(digits),
        arms="pre",
        seeds=1,
        encoder_steps=3,
        first_steps=0,
        steps=2,
        num_images=6,
        num_fit=10,
        val_samples=4,
        platform="cpu",
    )
    arm = json.loads((tmp_path / "out" / "summary.json").read_text())["arms"]["pre"]
    run = arm["seeds"]["1"]
    assert [layer["layer"] for layer in run["layers"]] == [0, 1, 2]
    assert run["answers"]["all"] == 4 and run["over_training"][-1]["step"] == 2
    assert "effective_dimension@middle" in arm["metrics"]
    assert Path(tmp_path / "runs" / "pre_seed1" / "checkpoints" / "step=2").is_dir()
