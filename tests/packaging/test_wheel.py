"""The wheel is complete: where no clone can be imported, it composes every recipe and trains two steps."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import recipes

CLONE = Path(__file__).parents[2]
PACKAGES = ("nemo_pre", "recipes", "data_prep")

COMPOSE_EVERY_RECIPE = """
import itertools, json, data_prep, nemo_pre, recipes
from nemo_pre.config.compose import compose_config, compose_run

def compose_each(groups, *words):  # one of every group at a time
    for chosen in itertools.zip_longest(*([f"{group}={name}" for name in composed[group]] for group in groups)):
        compose_config([*words, *(word for word in chosen if word not in (None, "model=of_init_from"))])

composed = {group: recipes.choices(group) for group in recipes.groups()}
for name in composed["experiment"]:
    compose_run([f"experiment={name}"])
compose_each(composed.keys() - {"experiment", *recipes.PARTS_OF_GROUPS})
compose_each(recipes.PARTS_OF_GROUPS, "model=siglip2_qwen25_7b")  # which is put together of parts
print(json.dumps({"from": [package.__file__ for package in (data_prep, nemo_pre, recipes)], "composed": composed}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=CLONE, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The folder of commands of an environment that has the wheel, and what we depend on from the one that tests.

    Of the latter no .pth file is read, so that its editable install does not lead back to the clone.
    """
    place = tmp_path_factory.mktemp("elsewhere") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place)], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    dependencies = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(dependencies))
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(place / "bin/python")]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    return place / "bin"


def run(words: list[str | Path], directory: Path, with_errors: bool = False) -> str:
    """The output of a command that knows nothing of the clone; if asked, behind what it writes as errors."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NEMO_PRE"))}
    done = subprocess.run(words, cwd=directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr + done.stdout if with_errors else done.stdout


def test_every_file_of_the_packages_is_in_the_wheel_beside_the_licence(wheel):
    ours = {
        path.relative_to(CLONE).as_posix()
        for package in PACKAGES
        for path in (CLONE / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = set(zipfile.ZipFile(wheel).namelist())
    assert {"nemo_pre/slurm/job.sh", "recipes/config.yaml", "nemo_pre/report/page.css"} <= ours
    assert {name for name in packed if ".dist-info/" not in name} == ours
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in packed)


def test_the_installed_wheel_composes_every_recipe(installed, tmp_path):
    found = json.loads(run([installed / "python", "-c", COMPOSE_EVERY_RECIPE], tmp_path))
    assert all(Path(file).is_relative_to(installed.parent) for file in found["from"]), found["from"]
    assert found["composed"] == {group: recipes.choices(group) for group in recipes.groups()}


def test_the_installed_wheel_makes_the_demos_data_and_trains_two_steps(installed, tmp_path):
    run([installed / "nemo-pre", "data", "demo", "num_scenes=200", "workers=1"], tmp_path)
    words = ["experiment=digits_taught_pre", "trainer.max_steps=2", "trainer.log_every=1", "trainer.val_samples=0"]
    seen = run([installed / "nemo-pre", "train", *words], tmp_path, with_errors=True).splitlines()
    check_words(seen, tmp_path / "runs/digits_taught_pre")
    metrics = [
        json.loads(line) for line in (tmp_path / "runs/digits_taught_pre/metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in metrics if "pre/loss" in line] == [1, 2]
    assert (tmp_path / "runs/digits_taught_pre/curves.png").is_file()


# What libraries say of what a run knows: none of it helps the one who reads.
NOT_SEEN = (
    "Gloo", "TPU", "HPU", "DEPRECATED", "deprecated", "Missing keys", "Unexpected keys", ".ckpt", "WARNING", "[NeMo",
    "rerun_state_machine", "srun", "val_dataloader", "----",
)  # fmt: skip


def check_words(seen: list[str], run: Path) -> None:
    """A user reads few lines before the first step, all of them ours, and last what was made; a file has the rest."""
    before = [line.startswith("step 1/2 |") for line in seen].index(True)
    assert before <= 15, seen
    assert not [line for line in seen for word in NOT_SEEN if word in line]
    assert "saved runs/digits_taught_pre/checkpoints/step=2" in seen[before:]
    assert seen[-1].startswith(
        "runs/digits_taught_pre/checkpoints/step=2; next: nemo-pre export runs/digits_taught_pre "
    )
    kept = (run / "rank0.log").read_text()
    assert "TPU available" in kept and "Gloo" in kept, kept


def test_the_installed_wheel_runs_a_recipe_of_the_working_directory(installed, tmp_path):
    own = tmp_path / "recipes/experiment/mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\ndefaults:\n  - digits_tiny\nname: mine\n")
    shown = run([installed / "nemo-pre", "train", "experiment=mine", "--cfg", "job"], tmp_path)
    assert "\nexperiment: mine, from recipes/experiment/mine.yaml\n" in shown and shown.startswith("name: mine\n")
    assert (
        "experiment: mine, from "
        in run(  # `python -m` has the working directory in front of the installed packages
            [installed / "python", "-m", "nemo_pre.cli", "train", "experiment=mine", "--cfg", "job"], tmp_path
        )
    )
