"""The words of ``nemo-pre rehearse``: what is refused before a process starts, and the exit code."""

import json
from dataclasses import replace

import pytest

from nemo_pre import cli
from nemo_pre.launch.ranks import RankFailure
from nemo_pre.rehearsal import rehearse as verb
from nemo_pre.rehearsal.compare import LEAK, Beside, missed
from nemo_pre.rehearsal.found import Found
from nemo_pre.rehearsal.places import Place
from nemo_pre.rehearsal.run import Rehearsed
from nemo_pre.slurm import submit as slurm

TINY = "experiment=digits_tiny_pre"


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["layers"], "'layers' is not an option of nemo-pre rehearse"),
        (["--json", "x"], "'--json' is not an option of nemo-pre rehearse"),
        ([TINY, "layers=0"], "layers=0 must be whole numbers of 1 or more"),
        ([TINY, "layers=many"], "layers=many must be whole numbers"),
        ([TINY, "layers=9"], "layers=9 is more than the 8 decoder layers"),
        ([TINY, "stages=3"], "stages=3 is none of the run's 2 pipeline stages"),
        ([TINY, "stages=[1,0]"], "must be whole numbers of 1 or more"),
        ([TINY, "messages=maybe"], "neither messages=true nor messages=false"),
        ([TINY, "parallel.pipeline=3"], "must divide model.language.num_layers"),
        ([TINY, "no.such=1"], "There is no option no"),
        (
            ["experiment=llava15_7b_stage2_full_viral", "objective.viral.target_path=my/model"],
            "objective.viral.target_path=my/model is not a directory here",
        ),
    ],
)
def test_what_cannot_be_rehearsed_is_refused_in_one_sentence(words, sentence, capsys):
    assert cli.main(["rehearse", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert sentence in error and len(error.splitlines()) == 1


def test_words_are_the_runs_or_the_rehearsals():
    words = [TINY, "layers=2", "stages=[1,2]", "messages=false", "jobs=3", "json=x.json", "optim.lr=1"]
    overrides, options = verb.read_options(words)
    assert overrides == [TINY, "optim.lr=1"]
    assert options == verb.Options(layers=2, stages=[0, 1], messages=False, jobs=3, json="x.json")


@pytest.fixture
def found(monkeypatch):
    """What every rehearsal finds here, without a process: change its ``problems``."""
    rank = Found(Place(0), 0, {"weights": 60}, [90, 100], [60, 60])
    beside = Beside(Place(0), {"weights": 60, "a step": 40}, {"weights": 60, "a step": 42})
    result = Rehearsed("run", "NeMo 2.7.3", None, 2, 8, 3, [beside], [rank], [[]], not_covered=["speed"])

    def run(config, wishes, tell):
        result.config = config
        result.asked = (config.name, wishes.layers)
        return result

    monkeypatch.setattr(verb, "run_rehearsal", run)
    return result


def test_the_exit_code_is_1_where_something_is_wrong(found, tmp_path, capsys):
    file = tmp_path / "rehearsal.json"
    assert cli.main(["rehearse", TINY, f"json={file}"]) == 0
    written = json.loads(file.read_text())
    assert written["problems"] == [] and written["ranks"][0]["peak"] == 100 and written["not_covered"] == ["speed"]
    assert "not covered: speed" in capsys.readouterr().out
    found.problems.append("stage 1: a leak.")
    assert cli.main(["rehearse", TINY]) == 1
    assert "found 1 problem: stage 1: a leak." in capsys.readouterr().err


def beside(measured, planned, **changed):
    kinds = ("weights", "gradients", "optimizer", "others that stay", "a step")
    both = [{"FP8 copies": 0, **dict(zip(kinds, sizes, strict=True))} for sizes in (measured, planned)]
    return Beside(Place(0), *both), replace(Found(Place(0), 0, {}, [0, 0], [0, 0]), **changed)


def test_a_plan_may_be_3_percent_over_and_never_under_and_state_is_as_planned():
    large = 10**9
    right = (large, large, large, 0, large)
    assert missed(*beside(right, right)) == []
    assert missed(*beside(right, (large, large, large, 0, large * 1.1))) == []
    assert "3.75% over" in missed(*beside(right, (large, large, large, 0, large * 1.15)))[0]
    assert "under the rehearsed peak" in missed(*beside(right, (large, large, large, 0, large * 0.99)))[0]
    assert "optimizer take" in missed(*beside(right, (large, large, large * 1.01, 0, large)))[0]
    assert "others that stay take" in missed(*beside((large, large, large, large, 0), right))[0]
    grown = missed(*beside(right, right, held=[0, LEAK + 1], grown=[("a.py:1  [7]", 5000)]))
    assert len(grown) == 1 and "4097 bytes more are held after a step" in grown[0] and "a.py:1" in grown[0]


# --- before a run ---------------------------------------------------------------------------------------------------

SITE = ["experiment=llava15_7b_stage2_full", "cluster=slurm_site", "cluster.gpu=h100", "--dry-run"]


def test_submit_rehearses_first_and_submits_nothing_where_something_is_wrong(found, capsys):
    slurm.submit([*SITE, "rehearse=true", "rehearse.layers=4"])
    assert found.asked == ("llava15_7b_stage2_full", 4)
    assert "sbatch" in capsys.readouterr().out.lower()
    found.problems.append("stage 1: a leak.")
    with pytest.raises(RankFailure, match="a leak"):
        slurm.submit([*SITE, "rehearse=true"])
    assert "#SBATCH" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, sentence",
    [(["rehearse=maybe"], "neither rehearse=true nor rehearse=false"), (["rehearse.layers=2"], "add rehearse=true")],
)
def test_submit_refuses_words_about_rehearsals_that_have_no_effect(words, sentence):
    with pytest.raises(ValueError, match=sentence):
        slurm.submit([*SITE, *words])
