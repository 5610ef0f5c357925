"""The recipes compose into typed runs, and what does not fit is refused in one sentence."""

import dataclasses
import re

import pytest
from omegaconf import OmegaConf

import recipes
from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_config, compose_run, missing_values, save_resolved
from nemo_pre.config.derived import num_visual_tokens, world_size
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import known
from tests.composed import experiment


@pytest.mark.parametrize("name", recipes.choices("experiment"))
def test_every_experiment_composes_to_a_run_without_problems_or_ignored_options(name, monkeypatch):
    monkeypatch.setattr("nemo_pre.checks.run.visible_gpus", lambda: 0)
    run = experiment(name)
    assert (run.name, run.experiment, run.output_dir) == (name, name, f"runs/{name}")
    assert check_options(run) == []


@pytest.mark.parametrize("name", recipes.choices("experiment"))
def test_an_objective_is_on_exactly_where_the_name_says_so(name):
    """LaVer's stages are named after it, and the second of them has it on."""
    objective, words = experiment(name).objective, re.split("[-_]", name)
    for kind in known():
        said = "laver_stage2" in name if kind == "laver" and "stage" in name else kind in words
        assert getattr(objective, kind).enabled == said, kind


def test_every_layout_composes_and_its_name_states_its_ranks():
    for name in recipes.choices("parallel"):
        run = compose_run(["experiment=digits_tiny", f"parallel={name}"])
        stated = {key: int(n) for key, n in re.findall(r"(tp|pp|cp|dp|vpp)(\d+)", name)}
        layout = run.parallel
        found = {"tp": layout.tensor, "pp": layout.pipeline, "cp": layout.context, "dp": layout.data}
        assert found == {key: stated.get(key, 1) for key in found}, name
        assert layout.virtual_pipeline == stated.get("vpp"), name
        assert layout.sequence == ("sp" in name.split("_")), name


def test_the_demo_sends_its_anchor_across_the_pipeline():
    run = compose_run(["experiment=digits_tiny_pre"])
    layers_per_stage = run.model.language.num_layers // run.parallel.pipeline
    assert world_size(run.parallel) == 2
    assert all(layer > layers_per_stage for layer in run.objective.pre.layers)


def test_digits_tiny_gives_36_visual_tokens_and_the_real_models_576():
    assert num_visual_tokens(compose_run(["experiment=digits_tiny"]).model) == 36
    assert num_visual_tokens(compose_run(["experiment=llava15_7b_stage1_align"]).model) == 576
    assert num_visual_tokens(compose_run(["experiment=siglip2_qwen25_7b_stage1_align"]).model) == 576


def test_stage_two_starts_from_the_stage_one_of_the_same_model_and_trains_at_the_published_rates():
    for model in ("llava15_7b", "siglip2_qwen25_7b"):
        align = compose_run([f"experiment={model}_stage1_align"])
        assert (align.optim.lr, align.trainer.global_batch_size) == (1e-3, 256)
        assert (align.optim.freeze_vision, align.optim.freeze_language, align.optim.freeze_projector) == (
            True,
            True,
            False,
        )
        frozen = compose_run([f"experiment={model}_stage2_frozen_pre"])
        assert frozen.init_from == f"{align.output_dir}/checkpoints"
        assert (frozen.optim.lr, frozen.optim.freeze_vision, frozen.trainer.global_batch_size) == (2e-5, True, 128)
        full = compose_run([f"experiment={model}_stage2_full_pre"])
        assert (full.optim.lr, full.optim.lr_vision, full.optim.freeze_vision) == (1e-5, 2e-6, False)
        assert full.init_from == frozen.init_from


def test_a_learning_rate_of_zero_stays_zero():
    assert compose_run(["experiment=digits_tiny", "optim.lr_vision=0"]).optim.lr_vision == 0.0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["foo=1"], "There is no option foo: "),
        (["experiment=digits_tiny", "model.vision.nope=1"], "There is no option model.vision.nope: "),
        (["experiment=digits_tiny", "+trainer.nope=1"], "There is no option trainer.nope: "),
        (["experiment=nope"], "experiment=nope does not exist: choose one of aimv2_qwen25_7b_laver_stage1_align, "),
        (["experiment=digits_tinny"], "experiment=digits_tinny does not exist: the nearest is digits_tiny; "),
        (["parallel=tp3"], "parallel=tp3 does not exist: choose one of cp2, "),
        (["experiment=digits_tiny", "trainer.max_steps=many"], "trainer.max_steps has a value that does not fit: "),
        (["experiment=digits_tiny", "parallel.sequence=maybe"], "parallel.sequence has a value that does not fit: "),
        (["experiment=digits_tiny", "objective.pre.layers=3"], "objective.pre.layers has a value that does not fit: "),
        (["experiment=digits_tiny", "data.path=null"], "data.path has a value that does not fit: "),
        (["experiment=digits_tiny", "optim.lr=${nope}"], "optim.lr has a value that does not fit: "),
        (["experiment=digits_tiny", "optim.lr"], "'optim.lr' cannot be read: "),
        ([], "The run is not complete, name, trainer.global_batch_size, trainer.max_steps, "),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ValueError) as refusal:
        compose_run(overrides)
    text = str(refusal.value)
    assert text.startswith(sentence)
    assert text.endswith(".")
    assert "\n" not in text


def test_without_an_experiment_the_config_can_be_looked_at():
    config = compose_config([])
    assert "trainer.max_steps" in missing_values(config)
    assert config.model.name == "digits_tiny"


def test_the_saved_config_is_the_run_and_holds_every_field(tmp_path):
    run = compose_run(["experiment=digits_tiny_pre", "optim.lr=3e-4"])
    save_resolved(run, tmp_path / "run" / "config.yaml")
    saved = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert set(saved) == {field.name for field in dataclasses.fields(RunConfig)}
    assert "${" not in (tmp_path / "run" / "config.yaml").read_text()
    assert OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), saved)) == run


def test_nothing_is_saved_that_a_reader_would_refuse(tmp_path):
    run = compose_run(["experiment=digits_tiny_pre"])
    run.data.path = ""
    with pytest.raises(ValueError, match="data.path is empty"):
        save_resolved(run, tmp_path / "config.yaml")
    assert not (tmp_path / "config.yaml").exists()
