"""A user's own recipes are found beside the packaged ones, and nothing takes the place of another in silence."""

import re
from pathlib import Path

import pytest

import recipes
from nemo_pre.cli import train_help
from nemo_pre.config.compose import compose_run, to_yaml
from nemo_pre.huggingface.architecture import is_recipe, new_tower
from nemo_pre.scaling.grid import Grid
from nemo_pre.slurm.submit import parse, render

EXPERIMENT = """\
# @package _global_
defaults:
  - digits_tiny
  - override /model: {model}
  - override /parallel: dp2
name: mine
trainer:
  max_steps: 7
"""
MODEL = """\
defaults:
  - digits_tiny
name: mine
language:
  num_layers: 6
"""


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A working directory outside of the clone with an experiment and a model of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(recipes.OWN_VARIABLE, raising=False)
    write(tmp_path / "recipes/experiment/mine.yaml", EXPERIMENT.format(model="mine_6_layers"))
    write(tmp_path / "recipes/model/mine_6_layers.yaml", MODEL)
    return tmp_path / "recipes"


def test_an_experiment_in_the_working_directory_composes_with_a_model_beside_it(own):
    run = compose_run(["experiment=mine", "optim.lr=0.5"])
    assert (run.name, run.trainer.max_steps, run.optim.lr, run.parallel.data) == ("mine", 7, 0.5, 2)
    assert (run.model.name, run.model.language.num_layers) == ("mine", 6)
    assert run.model.language.hidden_size == compose_run(["experiment=digits_tiny"]).model.language.hidden_size


def test_the_examples_of_the_manual_compose(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(recipes.OWN_VARIABLE, raising=False)
    for page in ("training", "cluster"):
        text = (recipes.DIRECTORY.parent / "docs" / f"{page}.md").read_text()
        for example in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
            write(tmp_path / re.search(r"# (recipes/\S+)\n", example)[1], example)
    run = compose_run(["experiment=mine", "cluster=mysite"])
    assert (run.name, run.objective.pre.enabled, run.objective.pre.layers) == ("mine", True, [7, 14])
    assert (run.model.name, run.model.vision.feature_layer) == ("mine_siglip2_qwen25_7b", -1)
    assert (run.cluster.name, run.cluster.partition, run.cluster.cpus_per_task) == ("mysite", "h100", 12)


def test_the_variable_names_a_folder_instead_of_the_working_directorys(own, tmp_path, monkeypatch):
    other = own.rename(tmp_path / "it's my [own], folder")
    write(tmp_path / "recipes/experiment/unseen.yaml", EXPERIMENT.format(model="digits_tiny"))
    monkeypatch.setenv(recipes.OWN_VARIABLE, str(other))
    assert compose_run(["experiment=mine"]).model.language.num_layers == 6
    with pytest.raises(ValueError, match="^experiment=unseen does not exist: choose one of "):
        compose_run(["experiment=unseen"])


def test_a_folder_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv(recipes.OWN_VARIABLE, "nowhere")
    with pytest.raises(ValueError, match=r"^NEMO_PRE_RECIPES=nowhere is not a folder: "):
        compose_run(["experiment=digits_tiny"])


@pytest.mark.parametrize(
    "name", ["experiment/digits_tiny", "model/vision/clip_l14_336", "objective/laver/paper", "config"]
)
def test_a_name_that_the_package_has_too_is_refused_with_both_files(own, name):
    mine = write(own / f"{name}.yaml", "name: mine\n")
    with pytest.raises(ValueError) as refusal:
        compose_run(["experiment=mine"])
    both = f"{mine.relative_to(own.parent)} has the name of {recipes.DIRECTORY / name}.yaml"
    assert str(refusal.value) == (
        f"{both}, which comes with nemo-pre: give yours another name, or work outside of that folder."
    )


def test_a_folder_that_could_be_imported_in_the_packages_place_is_refused(own):
    write(own / "__init__.py", "")
    with pytest.raises(
        ValueError, match=r"^recipes/__init__.py lets .* take your recipes for nemo-pre's own: remove it"
    ):
        compose_run(["experiment=mine"])


def test_in_a_clone_the_folder_of_recipes_is_the_packages_own(monkeypatch):
    monkeypatch.delenv(recipes.OWN_VARIABLE, raising=False)
    monkeypatch.chdir(recipes.DIRECTORY.parent)
    assert recipes.directories() == [recipes.DIRECTORY]
    assert compose_run(["experiment=digits_tiny"]).experiment == "digits_tiny"


def test_a_search_path_of_hydras_is_refused_since_it_would_win_or_lose_in_silence():
    with pytest.raises(ValueError, match=r"^hydra.searchpath cannot be set: .* NEMO_PRE_RECIPES\.$"):
        compose_run(["experiment=digits_tiny", "hydra.searchpath=[file:///elsewhere]"])


def test_a_saved_run_says_which_file_its_experiment_was(own):
    assert "\nexperiment: mine, from recipes/experiment/mine.yaml\n" in to_yaml(compose_run(["experiment=mine"]))
    assert compose_run(["experiment=digits_tiny"]).experiment == "digits_tiny"


def test_help_refusals_grids_and_imports_know_them_too(own):
    packaged = recipes.find("model/vision", "patch_mlp").read_text()
    write(own / "model/vision/mine_mlp.yaml", packaged.replace("hidden_size: 1024", "hidden_size: 512"))
    assert "mine_6_layers" in train_help() and "mine_mlp" in train_help()
    assert "mine" in recipes.choices("experiment") and "vision/mine_mlp" not in recipes.choices("model")
    with pytest.raises(ValueError, match="^experiment=miner does not exist: the nearest is mine; "):
        compose_run(["experiment=miner"])
    assert Grid(experiments=["mine"], gpus=[8]).points()
    assert is_recipe(Path("mine_mlp")) and new_tower(Path("mine_mlp")).hidden_size == 512


def test_a_batch_script_names_the_folder_again_for_the_job_composes_the_run_anew(own, monkeypatch):
    words = ["experiment=mine", "platform=gpu", "cluster=slurm_site", "cluster.gpu=h100"]
    words += ["cluster.devices_per_node=2", "--dry-run"]
    (script,) = (job.script for job in render(parse(words)))
    assert recipes.OWN_VARIABLE not in script
    monkeypatch.setenv(recipes.OWN_VARIABLE, "recipes")
    (script,) = (job.script for job in render(parse(words)))
    assert f"\nexport NEMO_PRE_RECIPES={own}\n" in script
