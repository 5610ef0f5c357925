"""An objective that comes in a folder of its own is known to all: options, checks, plan, training, metrics, resuming,
export and card. Nothing of the product is changed for it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MADE_UP = Path(__file__).parent / "made_up"
RUN = [
    "experiment=digits_tiny",
    "platform=cpu",
    "model.language.num_layers=4",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.val_samples=0",
    "trainer.checkpoint_every=2",
    "trainer.log_every=1",
    "objective.shift.enabled=true",
    "objective.shift.layers=[3]",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as pip would leave it, which nobody has installed."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(MADE_UP, folder, dirs_exist_ok=True)
    return folder


def nemo_pre(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line, with the folder on Python's path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    program = "import sys; from nemo_pre.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["objective.shift.direction=left"], "objective.shift.direction=left is unknown: choose one of up, down."),
        (["objective.shift.head_width=0"], "objective.shift.head_width=0 must be 1 or more."),
        (["objective.shift.direction=down", "objective.shift.head_width=3"], "head_width=3 must be even to go down"),
        (["objective.shift.layers=[3,9]"], "objective.shift.layers=[3, 9] must name different layers between 1 and 4"),
        (["objective.shift.schedule.kind=sine"], "objective.shift.schedule.kind=sine is unknown"),
    ],
)
def test_its_options_are_checked(folder: Path, digits: Path, words: list[str], sentence: str) -> None:
    done = nemo_pre(folder, "train", *RUN, f"data.path={digits}", "dry_run=true", *words)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr


def test_it_is_summarised_and_options_without_effect_are_warned_of(folder: Path, digits: Path) -> None:
    words = [f"data.path={digits}", "dry_run=true"]
    done = nemo_pre(folder, "train", *RUN, *words, "objective.shift.schedule.start=0.5")
    assert "language model + Shift at layer 3, weight 0.3" in done.stdout + done.stderr
    assert "objective.shift.schedule.start and steps have no effect" in done.stdout + done.stderr
    off = nemo_pre(folder, "train", *RUN, *words, "objective.shift.enabled=false")
    assert "objective.shift.layers have no effect with objective.shift.enabled=false" in off.stdout + off.stderr


def test_a_plan_counts_it_or_says_that_it_does_not(folder: Path, tmp_path: Path) -> None:
    done = nemo_pre(folder, "plan", *RUN, "objective.uncounted.enabled=true", f"json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    assert "The plan does not count objective.uncounted" in done.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    width = 128
    assert plan["parameters"]["shift"] == (width + 1) * 8 and "objective.uncounted" in plan["not_counted"][0]
    assert plan["flops_per_step"]["Shift's head"] > 0
    assert any("Shift heads" in kind for stage in plan["stages"].values() for kind in stage["by_kind"])


def test_it_trains_resumes_and_is_dropped_by_an_export(folder: Path, digits: Path, tmp_path: Path) -> None:
    run = [*RUN, f"data.path={digits}", f"output_dir={tmp_path / 'run'}"]
    done = nemo_pre(folder, "train", *run, "trainer.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert "shifted" in done.stdout, "the progress line names its metric"
    other = nemo_pre(folder, "train", *run, "trainer.max_steps=4", "objective.shift.head_width=16")
    assert other.returncode == 2, "decided before ranks start"
    assert "cannot go on with objective.shift.head_width=16 (before 8)" in other.stderr
    assert "since the objective does not say what becomes of it" in other.stderr
    done = nemo_pre(folder, "train", *run, "trainer.max_steps=4")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["shift/loss"] for line in lines if "shift/loss" in line}
    assert sorted(losses) == [1, 2, 3, 4] and losses[4] < losses[1]

    done = nemo_pre(folder, "export", str(tmp_path / "run"), str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    from safetensors import safe_open

    names = [name for file in (tmp_path / "hf").glob("*.safetensors") for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert names and not any("shift" in name for name in names)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Shift (nobody's, nowhere), weight 0.3" in card and "| shift/loss |" in card
    shutil.copytree(tmp_path / "run", tmp_path / "other", ignore=shutil.ignore_patterns("checkpoints"))
    config = tmp_path / "other" / "config.yaml"  # as if it had been of another weight: another arm
    assert "weight: 0.3" in config.read_text()
    config.write_text(config.read_text().replace("weight: 0.3", "weight: 0.2"))
    done = nemo_pre(folder, "compare", str(tmp_path / "run"), str(tmp_path / "other"), f"out={tmp_path / 'compared'}")
    assert "shift/loss" in done.stdout, done.stdout + done.stderr


def test_without_its_package_a_run_of_it_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    done = nemo_pre(tmp_path, "train", *RUN, "dry_run=true")
    assert done.returncode == 2 and "shift" in done.stderr


def test_no_file_outside_an_objectives_own_names_one() -> None:
    """Attributes, strings and imports; what a sentence of a docstring or comment says of a paper is not looked at."""
    import ast

    import nemo_pre
    from nemo_pre.objectives.registry import known

    package = Path(nemo_pre.__file__).parent
    own = {package / "objectives" / name for name in known()}
    presets = {package / "study", package / "evaluation"}  # arms of the study, the papers' suites of benchmarks
    found = []
    for file in sorted(package.rglob("*.py")):
        if file == package / "objectives" / "registry.py" or any(root in file.parents for root in own | presets):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            word = {ast.Attribute: "attr", ast.Name: "id", ast.keyword: "arg", ast.arg: "arg"}.get(type(node))
            if word is not None and (getattr(node, word) or "").lower() in known():
                found.append(f"{file.relative_to(package)}:{node.lineno}")
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            if any(f"objectives.{name}" in module for name in known()):
                found.append(f"{file.relative_to(package)}:{node.lineno}")
    assert not found
