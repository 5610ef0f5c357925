"""Diagnostics during training are those of the checkpoint, in every layout, and leave training as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.job import train

SMALL = [
    "experiment=digits_tiny_pre",
    "platform=cpu",
    "model.language.num_layers=4",
    "model.vision.num_layers=2",
    "objective.pre.layers=[2]",
    "trainer.max_steps=3",
    "trainer.global_batch_size=8",
    "trainer.micro_batch_size=2",
    "trainer.val_samples=0",
    "trainer.log_every=1",
]
MEASURED = "trainer.log_diagnostics_every=2"
LAYOUTS = ("pp2", "tp2_sp", "cp2", "dp2")


def trained(
    digits: Path, output: Path, *options: str, layout: str = "single", saves: bool = False
) -> list[dict[str, float]]:
    where = [f"parallel={layout}", f"output_dir={output}", f"data.path={digits}"]
    train(1 if layout == "single" else 2, [*SMALL, *where, *options], saves=saves)
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def diagnostics(lines: list[dict[str, float]]) -> dict[str, float]:
    """By step and name, without the time."""
    return {
        f"{line['step']} {name}": value
        for line in lines
        for name, value in line.items()
        if name.startswith("diagnostics/") and name != "diagnostics/seconds"
    }


@pytest.fixture(scope="module")
def start(digits, tmp_path_factory) -> str:
    """Weights to start from: random ones depend on the layout."""
    output = tmp_path_factory.mktemp("start") / "run"
    trained(digits, output, "trainer.max_steps=1", saves=True)
    return f"init_from={output / 'checkpoints'}"


@pytest.fixture(scope="module")
def on_one_rank(digits, start, tmp_path_factory) -> list[dict[str, float]]:
    return trained(digits, tmp_path_factory.mktemp("one") / "run", start, MEASURED)


def test_every_layer_is_measured_at_the_interval_and_at_the_end(on_one_rank):
    found = diagnostics(on_one_rank)
    for step in (2, 3):
        for layer in range(5):
            for name in ("pairwise_cosine", "effective_dimension", "contrast_difference", "probe_count"):
                assert f"{step} diagnostics/{name}/layer_{layer}" in found
    assert not any(name.startswith("1 ") for name in found)
    assert any(line.get("diagnostics/seconds", 0) > 0 for line in on_one_rank)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_does_not_show_in_the_diagnostics(layout, on_one_rank, start, digits, tmp_path):
    found = trained(digits, tmp_path / "run", start, MEASURED, layout=layout)
    assert diagnostics(found) == pytest.approx(diagnostics(on_one_rank), rel=1e-3, abs=1e-3)


def test_training_goes_on_as_without_them(on_one_rank, start, digits, tmp_path):
    plain = trained(digits, tmp_path / "run", start)

    def losses(lines: list[dict[str, float]]) -> list[float]:
        return [line["lm/loss"] for line in lines if "lm/loss" in line]

    assert losses(on_one_rank) == losses(plain)


def test_an_interval_below_one_is_refused():
    from nemo_pre.checks.run import check_options
    from nemo_pre.config.compose import compose_run

    with pytest.raises(ValueError, match="trainer.log_diagnostics_every=0 must be 1 or more"):
        check_options(compose_run([*SMALL, "trainer.log_diagnostics_every=0"]))
