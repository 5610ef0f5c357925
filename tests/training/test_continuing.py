"""Runs that go on with other options do from the next step on what runs with these options do there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import RankError
from tests.training.job import train, train_and_describe

STEPS, SAVED, WARMUP = 12, 6, 3
SMALL = [
    "platform=cpu",
    "model.language.num_layers=2",
    "model.vision.num_layers=1",
    f"trainer.checkpoint_every={SAVED}",
    "trainer.keep_checkpoints=9",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=4",
    "trainer.log_every=1",
    "trainer.val_samples=0",
    "data.record_samples=true",
]
SCHEDULED = [
    "experiment=digits-pre-laver",
    *SMALL,
    "objective.laver.head_hidden_width=16",
    "objective.laver.momentum_schedule=cosine",
    f"optim.warmup_ratio={WARMUP / STEPS}",
    "optim.min_lr_ratio=0.1",
]
CONSTANT = ["experiment=digits_tiny", *SMALL, "optim.warmup_ratio=0", "optim.min_lr_ratio=1"]
# Of PRe and LaVer everything that is logged but time; the schedules are lr, laver/mask_ratio and laver/momentum.
TIMES = {"time", "step_time", "samples_per_second"}
SCHEDULES = ("lr", "laver/mask_ratio", "laver/momentum")


def words(run: list[str], output: Path, data: Path, *more: str) -> list[str]:
    return [*run, f"output_dir={output}", f"data.path={data}", *more]


def lines(output: Path) -> dict[int, dict[str, float]]:
    """What is logged, by step."""
    found: dict[int, dict[str, float]] = {}
    for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines()):
        found.setdefault(line["step"], {}).update({name: each for name, each in line.items() if name not in TIMES})
    return found


def samples(output: Path) -> dict[int, list[str]]:
    return {line["step"]: line["samples"] for line in map(json.loads, (output / "samples.jsonl").open())}


def of_last_steps(output: Path) -> dict[int, dict[str, float]]:
    return {step: values for step, values in lines(output).items() if step > SAVED}


def at(saved: Path, output: Path) -> Path:
    """A directory with nothing but another run's checkpoint after step SAVED."""
    shutil.copytree(saved / "checkpoints" / f"step={SAVED}", output / "checkpoints" / f"step={SAVED}")
    return output


def rate(step: int, peak: float, floor: float, steps: int, warmup: int) -> float:
    """The learning rate of the step behind ``step`` ones, by hand."""
    if step <= warmup:
        return peak * (step + 1) / (warmup + 1)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """Twelve steps with schedules of everything that has one."""
    output = tmp_path_factory.mktemp("straight")
    train(1, words(SCHEDULED, output, digits, f"trainer.max_steps={STEPS}"))
    return output


def test_a_run_that_goes_on_with_the_same_options_is_the_uninterrupted_one(straight, digits, tmp_path) -> None:
    output = at(straight, tmp_path)
    train(1, words(SCHEDULED, output, digits, f"trainer.max_steps={STEPS}"), saves=False)
    assert of_last_steps(output) == of_last_steps(straight)
    assert samples(output) == {step: of for step, of in samples(straight).items() if step > SAVED}


def test_a_finished_run_that_is_made_longer_has_all_schedules_of_the_longer_one(straight, digits, tmp_path) -> None:
    run = words(SCHEDULED, tmp_path, digits)
    train(1, [*run, f"trainer.max_steps={SAVED}"])
    ended = lines(tmp_path)[SAVED]
    train(1, [*run, f"trainer.max_steps={STEPS}"], saves=False)
    found, expected = of_last_steps(tmp_path), of_last_steps(straight)
    assert list(found) == list(range(SAVED + 1, STEPS + 1))
    for step, values in found.items():
        assert [values.get(name) for name in SCHEDULES] == [expected[step].get(name) for name in SCHEDULES], step
        assert values["lr"] == pytest.approx(rate(step - 1, 1.5e-3, 1.5e-4, STEPS, WARMUP))
        assert step == STEPS or values["laver/momentum"] < 1 and values["laver/mask_ratio"] > 0
    assert ended["lr"] < found[SAVED + 1]["lr"], "the comparison above can fail"


def test_where_no_option_follows_the_length_a_longer_run_is_the_straight_one(digits, tmp_path) -> None:
    whole, made_longer = tmp_path / "whole", tmp_path / "longer"
    train(1, words(CONSTANT, whole, digits, f"trainer.max_steps={STEPS}"), saves=False)
    train(1, words(CONSTANT, made_longer, digits, f"trainer.max_steps={SAVED}"))
    train(1, words(CONSTANT, made_longer, digits, f"trainer.max_steps={STEPS}"), saves=False)
    assert lines(made_longer) == lines(whole) and samples(made_longer) == samples(whole)


CHANGED = [
    *("optim.lr=1e-3", "optim.lr_vision=2e-4", "optim.lr_heads=0", "optim.weight_decay=0.3", "optim.beta1=0.8"),
    *("optim.beta2=0.9", "optim.eps=1e-6", "optim.min_lr_ratio=0.5", "optim.warmup_ratio=0", "trainer.max_steps=10"),
]


def without_place(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups without what depends on the step."""
    return [{name: value for name, value in group.items() if name not in ("step", "lr")} for group in groups]


def test_changed_options_are_those_of_a_run_that_began_with_them(straight, digits, tmp_path) -> None:
    output = at(straight, tmp_path / "changed")
    more = [*CHANGED, "trainer.global_batch_size=4"]
    groups = train_and_describe(words(SCHEDULED, output, digits, *more))
    fresh = train_and_describe(words(SCHEDULED, tmp_path / "fresh", digits, *CHANGED[:-1], "trainer.max_steps=1"))
    assert without_place(groups) == without_place(fresh)
    assert {group["pre_lr_mult"] for group in groups} == {1.0, 0.2, 0.0}
    assert {group["step"] for group in groups} == {10}
    found = of_last_steps(output)
    assert [values["lr"] for values in found.values()] == pytest.approx(
        [rate(step, 1e-3, 5e-4, 10, 0) for step in range(SAVED, 10)]
    )
    # The data goes on at the next sample: two steps of four are one of eight.
    expected, trained = samples(straight), samples(output)
    for step in (SAVED + 1, SAVED + 3):
        assert trained[step] + trained[step + 1] == expected[SAVED + 1 + (step - SAVED) // 2]
    assert yaml.safe_load((output / "config.yaml").read_text())["optim"]["weight_decay"] == 0.3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_the_distributed_optimizer_too(digits, tmp_path, precision) -> None:
    run = ["experiment=digits_tiny", *SMALL, f"precision={precision}", "parallel.distributed_optimizer=false"]
    whole, same, other = (tmp_path / name for name in ("whole", "same", "other"))
    train(1, words(run, whole, digits, "trainer.max_steps=8"))
    train(1, words(run, at(whole, same), digits, "trainer.max_steps=8"), saves=False)
    assert of_last_steps(same) == of_last_steps(whole)
    more = [*(word for word in CHANGED if "lr_heads" not in word), "optim.lr_projector=0"]
    groups = train_and_describe(words(run, at(whole, other), digits, *more))
    fresh = train_and_describe(words(run, tmp_path / "fresh", digits, *more, "trainer.max_steps=1"))
    assert without_place(groups) == without_place(fresh)
    assert {group["step"] for group in groups} == {10} and list(of_last_steps(other)) == [7, 8, 9, 10]


def test_what_is_kept_follows_the_options_and_every_save_knows_its_place(digits, tmp_path) -> None:
    run = words(CONSTANT, tmp_path, digits)
    checkpoints = tmp_path / "checkpoints"
    train(1, [*run, "trainer.max_steps=3", "trainer.checkpoint_every=1"])
    assert sorted(path.name for path in checkpoints.glob("step=*")) == ["step=1", "step=2", "step=3"]
    train(1, [*run, "trainer.max_steps=5", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=2"])
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=4", "step=5"]
    progress = [json.loads((checkpoints / name / "progress.json").read_text()) for name in ("step=4", "step=5")]
    assert [(each["step"], each["saves"]) for each in progress] == [(4, 4), (5, 5)]


def test_ranks_refuse_what_would_count_anew_beside_the_runs_checkpoints(straight, digits, tmp_path) -> None:
    """They decide as the launcher does, and look into the checkpoint too, which may not have what its config says."""
    output = at(straight, tmp_path)
    with pytest.raises(
        RankError, match=r"cannot go on with objective.pre.enabled=false .*init_from=.*checkpoints output_dir="
    ):
        train(1, words(SCHEDULED, output, digits, "trainer.max_steps=12", "objective.pre.enabled=false"))
    saved = output / "checkpoints" / f"step={SAVED}"
    config = yaml.safe_load((saved / "config.yaml").read_text())
    config["objective"]["viral"] |= {"enabled": True, "target": "encoder", "head_hidden_width": 8}
    (saved / "config.yaml").write_text(yaml.safe_dump(config))
    for name in ("sizes.json", "checksums.json"):
        (saved / name).unlink()
    viral = ["objective.viral.enabled=true", "objective.viral.target=encoder", "objective.viral.head_hidden_width=8"]
    with pytest.raises(
        RankError, match=r"since .*step=6 has no viral_head: set the options of objective.viral as they"
    ):
        train(1, words(SCHEDULED, output, digits, "trainer.max_steps=12", *viral))
    assert not (output / "config.yaml").exists() and not (output / "metrics.jsonl").exists()
