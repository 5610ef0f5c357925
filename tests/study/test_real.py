"""The study on a language model that has read: its runs and their order, what is taken up of them, what is claimed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.emoji import prepare
from nemo_pre.report.intervals import Estimate
from nemo_pre.study.claims import NOT_SEEN, OPPOSITE, SEEN, UNDECIDED, Claim
from nemo_pre.study.prepare_real import write_text
from nemo_pre.study.real import study
from nemo_pre.study.real_arms import real_arms, real_first_stages, teacher_momentum
from nemo_pre.study.schedule import alone
from tests.data_prep.emoji_packages import write_all
from tests.study.processes import Processes

LAYERS = 8


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "emoji"
    prepare(
        [str(write_all(tmp_path_factory.mktemp("packages")))],
        out,
        num_scenes=40,
        held_out_style="twitter",
        held_out_concepts=0.25,
    )
    return out


@pytest.fixture
def processes(monkeypatch) -> Processes:
    found = Processes()
    found.stand_in(monkeypatch)
    monkeypatch.setattr("nemo_pre.study.prepare_real.random_language", lambda language, root, seed: root / "random")
    return found


@pytest.fixture
def ask(emoji, tmp_path, processes):
    language = tmp_path / "language"
    language.mkdir()
    (language / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))

    def asked(**more: Any) -> dict[str, Any]:
        places = {name: str(tmp_path / name) for name in ("runs", "out")}
        how = {"data": str(emoji), "language": str(language), "page": str(tmp_path / "study.md"), "steps": 4}
        study(**{**places, **how, "platform": "cpu", "first_steps": 2, **more})
        return json.loads((tmp_path / "out" / "summary.json").read_text())

    return asked


def test_every_beginning_of_the_runs_answers_something(ask, processes, capsys):
    names = study_names(ask, capsys)
    second = [name for name in names if not name.startswith(("first", "start", "random_start"))]
    main = [f"{arm}_seed{seed}" for seed in (1, 2) for arm in ("baseline", "pre", "mixed_2d", "laver", "random")]
    assert second[: len(main)] == main
    assert second.index("pre_last_seed1") < second.index("baseline_seed3")
    for name, needs in (("baseline", "first_causal"), ("laver", "first_mixed_2d"), ("random", "first_random")):
        assert names.index(f"{needs}_seed1") < names.index(f"{name}_seed1")
    assert len(set(names)) == len(names)


def study_names(ask: Any, capsys: Any) -> list[str]:
    with pytest.raises(FileNotFoundError):  # nothing is written, so that there is no summary to read
        ask(dry_run=True)
    return [Path(line.partition(":")[0]).name for line in capsys.readouterr().out.splitlines()]


def test_a_run_is_measured_before_after_and_along_its_second_stage_and_a_kill_costs_no_measurement(
    ask, processes, tmp_path
):
    ask(arms="baseline,random", seeds=1)
    assert [verb for verb, _ in processes.verbs() if verb not in ("train", "diagnose")] == [
        "study",
        "import",
        "import",
        "data",
        "data",
    ]
    diagnosed = [
        words[0].removeprefix(str(tmp_path / "runs")) for verb, *words in processes.commands if verb == "diagnose"
    ]
    assert diagnosed[:2] == ["/start_seed1", "/first_causal_seed1"]
    assert diagnosed[2:5] == [f"/baseline_seed1/checkpoints/step={step}" for step in (1, 2, 4)]
    assert "/random_start_seed1" in diagnosed
    of_baseline = next(words for verb, *words in processes.commands if verb == "train" and "baseline" in words[-1])
    assert f"init_from={tmp_path / 'runs' / 'first_causal_seed1' / 'checkpoints'}" in of_baseline
    assert [words for words in diagnosed if "/random_seed1/" in words] == ["/random_seed1/checkpoints/step=4"]
    (tmp_path / "runs" / "baseline_seed1" / "diagnosed.json").unlink()  # killed behind the second of three
    (tmp_path / "runs" / "baseline_seed1" / "diagnostics-4" / "diagnosed.json").unlink()
    processes.commands.clear()
    ask(arms="baseline,random", seeds=1)
    again = [words[0] for verb, *words in processes.commands if verb == "diagnose"]
    assert again == [str(tmp_path / "runs" / "baseline_seed1" / "checkpoints" / "step=4")]
    assert not [verb for verb, *_ in processes.commands if verb == "train"]


def test_what_has_run_is_told_with_intervals_and_what_has_not_is_pending(ask, tmp_path):
    summary = ask(arms="baseline,pre", seeds=3, most_runs=100)
    phases = summary["arms"]["baseline"]["seeds"]["1"]["phases"]
    assert list(phases) == ["start", "aligned", "1/4", "1/2", "end"]
    assert phases["end"]["layers"]["4"]["objects"]["concept"]["accuracy"] == pytest.approx(0.464)
    page = (tmp_path / "study.md").read_text()
    assert "6 of 6 second stages are finished." in page
    assert 0 < summary["settings"]["most_frequent"]["exact_match"] < 0.9
    assert "| always the most frequent answer |" in page
    dip = next(line for line in page.splitlines() if "middle less input, baseline" in line and "concept" in line)
    assert "**seen**" in dip and "| 3 |" in dip and "-3.2%" in dip
    answers = next(line for line in page.splitlines() if "exact match: PRe less baseline" in line)
    assert "not decidable here" in answers, "all seeds differ alike: no spread to judge by"
    lifted = next(line for line in page.splitlines() if "concept's probe in the middle: PRe less baseline" in line)
    assert "+10.0%" in lifted
    for figure in ("phases.png", "layers.png", "trade_off.png", "answers.png"):
        assert (tmp_path / "out" / figure).stat().st_size > 5_000
    (tmp_path / "out" / "remarks.md").write_text("Two steps decide nothing.")
    with alone(tmp_path / "runs"):  # a study that runs hinders no look
        ask(seeds=3, most_runs=0)
    page = (tmp_path / "study.md").read_text()
    assert "6 of 21 second stages are finished." in page and "Two steps decide nothing." in page
    laver = next(line for line in page.splitlines() if "LaVer less the same without its losses" in line)
    assert "not decidable here" in laver


def test_what_was_finished_on_another_machine_is_neither_repeated_nor_lost(ask, processes, tmp_path):
    before = ask(arms="baseline,pre", seeds=2)
    (tmp_path / "runs").rename(tmp_path / "gone")
    processes.commands.clear()
    again = ask(arms="baseline", seeds=2)  # of fewer arms, and of nothing that is here
    assert again == before and not processes.commands
    assert ask(arms="baseline,pre", seeds=2, most_runs=0) == before
    page = (tmp_path / "study.md").read_text()
    assert "4 of 4 second stages are finished." in page and "exact match: PRe less baseline" in page

    more = ask(arms="pre", seeds=3)
    begun = {name for verb, name in processes.verbs() if verb == "train"}
    assert begun == {"first_causal_seed3", "pre_seed3"}
    assert list(more["arms"]["pre"]["seeds"]) == ["1", "2", "3"]
    for seed in ("1", "2"):
        assert more["arms"]["pre"]["seeds"][seed] == before["arms"]["pre"]["seeds"][seed]
    assert list(more["arms"]["baseline"]["seeds"]) == ["1", "2"]


def test_a_summary_of_other_settings_or_of_another_encoder_is_not_mixed_with_or_written_over(ask, processes, tmp_path):
    ask(arms="baseline", seeds=1)
    file = tmp_path / "out" / "summary.json"
    held = file.read_bytes()
    processes.commands.clear()
    for options, told in (
        ({"steps": 8}, "other settings \\(steps 4, here 8\\)"),
        ({"options": ["optim.lr=1e-5"], "num_fit": 7}, "num_fit 600, here 7; options"),
        ({"most_runs": 0, "val_samples": 9}, "val_samples 128, here 9"),
    ):
        with pytest.raises(ValueError, match=told):
            ask(arms="baseline", seeds=2, **options)
    taught = tmp_path / "runs" / "encoder" / "encoder.json"
    taught.parent.mkdir(exist_ok=True)
    for name, accuracy in (("the same", 0.5), ("another", 0.6)):
        summary = json.loads(held)
        summary["settings"]["encoder"] = _encoder(0.5)
        file.write_text(json.dumps(summary))
        taught.write_text(json.dumps(_encoder(accuracy)))
        if name == "the same":
            ask(arms="baseline", seeds=1)
        else:
            with pytest.raises(ValueError, match="another encoder"):
                ask(arms="baseline", seeds=2)
    assert not processes.commands
    for broken in ("{}", "[1]", '{"format": 1', json.dumps({**json.loads(held), "format_version": 1})):
        file.write_text(broken)
        with pytest.raises(ValueError, match="give another out=DIRECTORY, or remove it"):
            ask(arms="baseline", seeds=2)
        assert file.read_text() == broken


def _encoder(accuracy: float) -> dict[str, Any]:
    vision = {"num_layers": 1, "hidden_size": 64, "image_size": 96, "patch_size": 16}
    return {"steps": 1, "batch": 2, "concepts": 3, "vision": vision, "accuracy": {"val": {"name": accuracy}}}


@pytest.mark.parametrize(
    "low, high, direction, verdict",
    [(0.1, 0.3, 1, SEEN), (0.1, 0.3, -1, OPPOSITE), (-0.1, 0.3, 1, NOT_SEEN), (None, None, 1, UNDECIDED)],
)
def test_an_interval_decides_a_claim(monkeypatch, low, high, direction, verdict):
    claim = Claim("PRe", "said", "measured", direction, "baseline", "exact_match")
    monkeypatch.setattr(Claim, "estimate", lambda self, summary: Estimate(0.2, low, high, 3))
    assert claim.verdict({}) == verdict
    monkeypatch.setattr(Claim, "estimate", lambda self, summary: None)
    assert claim.verdict({}) == UNDECIDED


def test_the_teacher_looks_back_over_as_large_a_part_of_a_short_stage_as_published():
    assert teacher_momentum(6250) == pytest.approx(0.999)
    assert 1 / (1 - teacher_momentum(320)) == pytest.approx(0.16 * 320, rel=1e-2)
    assert teacher_momentum(4) == 0.5


def test_every_arm_is_a_run_that_can_be_checked(emoji):
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    for arm in [*real_first_stages(), *real_arms(30, 320)]:
        options = ["experiment=smollm2_135m_emoji_pre", *arm.overrides, f"data.path={emoji}", "platform=cpu"]
        check_options(compose_run([*options, "parallel.labelled_output=true"]))


def test_plain_text_is_prose_and_always_the_same(tmp_path):
    for name in ("one.txt", "two.txt"):
        write_text(tmp_path / name)
    text = (tmp_path / "one.txt").read_text()
    assert text == (tmp_path / "two.txt").read_text() and len(text) > 30_000
    assert all(len(part) >= 200 for part in text.split("\n\n"))


@pytest.mark.parametrize(
    "options, told",
    [
        ({"steps": 6}, "steps=6: give a multiple of 4"),
        ({"arms": "nothing"}, "names no arm 'nothing'"),
        ({"language": "nowhere"}, "language=nowhere is no Hugging Face language model"),
        ({"data": "nowhere"}, "nowhere has no manifest"),
    ],
)
def test_wrong_options_are_one_sentence_each(ask, options, told):
    with pytest.raises(ValueError, match=told):
        ask(**options)
