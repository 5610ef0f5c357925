"""``nemo-pre scale``: the grid, its simulation, the jobs it submits, and what finished runs give."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import recipes
from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run
from nemo_pre.planner.devices import DEVICES, Efficiency
from nemo_pre.planner.load import largest_load
from nemo_pre.planner.step_time import step_time
from nemo_pre.scaling.grid import STUDIES, Grid, Point
from nemo_pre.scaling.results import SIMULATED, overheads
from nemo_pre.scaling.scale import job_words, read_words, scale, scale_help
from nemo_pre.scaling.simulate import simulate

H100, ASSUMED = DEVICES["h100"], Efficiency()
EXPERIMENT = "llava15_7b_stage2_full"
SMALL = [f"experiments={EXPERIMENT}", "gpus=8,16", "layouts=recipe"]


def points(*words: str) -> list[Point]:
    return read_words([*SMALL, *words])[0].points()


# --- the grid -------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_depths_only_where_there_is_pre() -> None:
    found = points("regularizers=none,pre", "batches=strong,weak", "depths=0.25,0.5")
    assert len(found) == 2 * 2 * (1 + 2)
    assert len({point.name for point in found}) == len(found)
    assert {point.depth for point in found if point.regularizer == "none"} == {None}
    assert {point.growth for point in found if point.batch == "weak"} == {1.0, 2.0}


def test_a_grid_is_read_from_a_file_and_words_go_before_it(tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(f"experiments: [{EXPERIMENT}]\ngpus: [8, 16]\noverrides: [trainer.max_steps=50]\n")
    grid, options = read_words([f"grid={file}", "gpus=32", "optim.lr=1e-4", f"out={tmp_path}"])
    assert (grid.gpus, grid.overrides) == ([32], ["trainer.max_steps=50", "optim.lr=1e-4"])
    assert options.out == tmp_path


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["gpus=8"], "needs experiments"),
        ([f"experiments={EXPERIMENT}", "gpus=eight"], "gpus=eight must be numbers"),
        ([*SMALL, "experiments=gpt5"], "experiments has 'gpt5'"),
        ([*SMALL, "regularizers=dropout"], "choose of recipe, laver, .*none, pre"),
        ([*SMALL, "depths=1.5"], "at most 1"),
        ([*SMALL, "action=guess"], "choose one of simulate, submit, collect"),
        ([*SMALL, "gpu=v100"], "gpu=v100 is unknown"),
        ([*SMALL, "--plot"], "not an option"),
        (["study=everything"], "choose one of sizes, target_depth"),
        (["grid=/nowhere.yaml"], "cannot be read"),
        ([*SMALL, "regularizers=none", "gpus=8,12", "batches=weak", "trainer.global_batch_size=9"], "samples is none"),
    ],
)
def test_a_wrong_word_is_refused_with_what_to_choose(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        scale(words)


def test_the_studies_name_recipes_that_exist_and_reach_70b_on_4096_gpus() -> None:
    for grid in STUDIES.values():
        assert set(grid.experiments) <= set(recipes.choices("experiment")) and grid.points()
    assert any("70b" in name for name in STUDIES["sizes"].experiments) and 4096 in STUDIES["sizes"].gpus
    assert "target_depth (24 runs)" in scale_help()


def test_a_target_depth_is_a_layer_in_proportion_to_the_model() -> None:
    grid = STUDIES["target_depth"]
    for name in grid.experiments:
        layers = compose_run([f"experiment={name}"]).model.language.num_layers
        point = Point(name, 64, "recipe", "recipe", 0.25, "strong", 1.0)
        assert simulate(point, H100, ASSUMED).target_layers == [layers // 4]


# --- simulated ------------------------------------------------------------------------------------------------------


def test_a_simulated_point_is_what_the_planner_says_of_the_run_its_words_give() -> None:
    for point in points("regularizers=pre", "depths=0.5", "batches=weak"):
        result = simulate(point, H100, ASSUMED)
        config = compose_run([*result.words, "cluster=local"])
        time = step_time(config, largest_load(config), H100, ASSUMED)
        check_options(config)
        assert result.step_seconds == pytest.approx(time.seconds) and time.ranks == point.gpus
        assert result.batch_size == config.trainer.global_batch_size == 16 * point.gpus
        assert result.gpu_hours == pytest.approx(time.seconds * 5198 / point.growth * point.gpus / 3600, rel=1e-3)


def test_cost_is_of_the_recipes_samples_whatever_batch_and_steps_the_study_has() -> None:
    words = ["trainer.global_batch_size=1024", "trainer.max_steps=50", "gpus=8"]
    [result] = [simulate(point, H100, ASSUMED) for point in points(*words)]
    assert (result.batch_size, result.samples) == (1024, 5198 * 128)
    assert result.days == pytest.approx(5198 * 128 / 1024 * (result.step_seconds or 0) / 86400)


def test_the_best_layout_is_one_that_train_accepts_and_no_slower_than_the_recipes() -> None:
    best, recipe = (
        simulate(Point(EXPERIMENT, 8, layout, "none", None, "strong", 1.0), H100, ASSUMED)
        for layout in ("best", "recipe")
    )
    check_options(compose_run(best.words))
    assert best.step_seconds is not None and recipe.step_seconds is not None
    assert best.step_seconds <= recipe.step_seconds


def test_a_point_without_a_layout_says_why() -> None:
    for layout, gpus, reason in (("tp8_pp4_sp", 8, "do not divide 8 GPUs"), ("best", 1, "do not fit")):
        result = simulate(Point(EXPERIMENT, gpus, layout, "none", None, "strong", 1.0), H100, ASSUMED)
        assert result.step_seconds is None and result.problem is not None and reason in result.problem


def test_pre_costs_nearly_nothing_and_laver_about_a_third_of_the_visual_share() -> None:
    """1 + 1.33 f of the decoder's FLOPs, f being the visual part of the tokens."""
    results = [
        simulate(point, H100, ASSUMED) for point in points("regularizers=none,pre,laver", "gpus=8", "layouts=best")
    ]
    found = {name: ratio for name, [(_, ratio)] in overheads(results).items()}
    assert 1.0 < found["pre"] < 1.01
    assert 1.25 < found["laver"] < 1 + 1.34 * 576 / 2048


def test_everything_it_writes_says_that_it_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale([*SMALL, "regularizers=none,pre", "batches=strong,weak", "price=2", f"out={tmp_path}"])
    text = capsys.readouterr().out
    assert SIMULATED in text and SIMULATED in (tmp_path / "results.txt").read_text()
    written = json.loads((tmp_path / "results.json").read_text())
    assert {point["source"] for point in written["points"]} == {"simulated"} and SIMULATED in written["what"]
    assert written["price_of_a_gpu_hour"] == 2 and len(written["points"]) == 8
    for name in ("strong_scaling", "weak_scaling", "overhead", "cost"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert SIMULATED.split(",")[0].replace("'", "") in _texts(tmp_path / f"{name}.svg")
    assert not (tmp_path / "target_depth.png").exists()


def _texts(svg: Path) -> str:
    """Matplotlib leaves every text beside its outlines as a comment."""
    return " ".join(line.strip(" <!->") for line in svg.read_text().splitlines() if "<!--" in line).replace("'", "")


# --- submitted and finished -----------------------------------------------------------------------------------------


def test_jobs_are_scripts_with_the_points_own_name_layout_and_directory(tmp_path, capsys) -> None:
    words = ["regularizers=pre", "depths=0.25,0.75", "gpus=16", "cluster=slurm_site", "cluster.gpu=h100"]
    words.append(f"out={tmp_path}")
    scale([*SMALL, *words, "action=submit", "--dry-run"])
    script = capsys.readouterr().out
    assert script.count("#!/usr/bin/env bash") == 2
    for layer, depth in ((8, "0.25"), (24, "0.75")):
        assert f"objective.pre.layers=[{layer}]" in script and f"depth{depth}" in script
    assert script.count("parallel.data=8") == 2 and f"{tmp_path}/runs/{EXPERIMENT}" in script


def test_finished_runs_take_the_place_of_their_simulation(tmp_path: Path, capsys) -> None:
    words = [*SMALL, "regularizers=pre", "depths=0.25,0.75", "gpus=8", f"out={tmp_path}"]
    grid: Grid = read_words(words)[0]
    first, second = grid.points()
    with pytest.raises(ValueError, match="no run of this grid"):
        scale([*words, "action=collect"])
    run = tmp_path / "runs" / first.name
    run.mkdir(parents=True)
    times = [9.0, *[2.0] * 19]  # the first step compiles
    lines = [{"step": n + 1, "time": 1.0 * n, "step_time": t, "lm/loss": 1.0} for n, t in enumerate(times)]
    lines.append({"step": 20, "time": 20.0, "val/lm_loss": 0.75})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    scale([*words, "action=collect"])
    text = capsys.readouterr().out
    measured, simulated = json.loads((tmp_path / "results.json").read_text())["points"]
    assert (measured["source"], simulated["source"]) == ("measured", "simulated")
    assert measured["step_seconds"] == 2.0 and measured["samples_per_second"] == 64.0
    assert measured["quality"] == {"lm/loss": 1.0, "val/lm_loss": 0.75} and measured["utilization"] is None
    assert "1 points are finished runs" in text and (tmp_path / "target_depth.png").is_file()


def test_a_jobs_words_give_the_run_that_was_simulated(tmp_path: Path) -> None:
    [point] = points("regularizers=laver", "gpus=8", "layouts=best")
    result = simulate(point, H100, ASSUMED)
    config = compose_run(job_words(result, tmp_path))
    assert config.output_dir == f"{tmp_path}/runs/{point.name}" and config.objective.laver.enabled
