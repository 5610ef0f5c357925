"""Language against vision over training is what a run's metrics say."""

from __future__ import annotations

import json
from pathlib import Path

from nemo_pre.diagnostics.over_training import over_training

RECORDS: list[dict[str, float]] = [
    {"step": 1, "lm/loss": 3.0},
    {"step": 2, "lm/loss": 2.0},
    {"step": 2, "diagnostics/probe_count/layer_2": 0.25, "diagnostics/probe_count/layer_4": 0.9},
    {"step": 4, "lm/loss": 1.0},
    {
        "step": 4,
        "diagnostics/probe_count/layer_2": 0.5,
        "diagnostics/probe_presence/layer_2": 0.75,
        "val/lm_loss": 1.5,
    },
]


def recorded(directory: Path, records: list[dict[str, float]]) -> Path:
    checkpoint = directory / "checkpoints" / "step=4"
    checkpoint.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return checkpoint


def test_probes_of_the_middle_layer_stand_beside_the_training_loss_since_the_record_before(tmp_path: Path):
    checkpoint = recorded(tmp_path, RECORDS)
    expected = [
        {"step": 2, "loss": 2.5, "probes": {"count": 0.25}},
        {"step": 4, "loss": 1.0, "probes": {"count": 0.5, "presence": 0.75}},
    ]
    for model in (tmp_path, tmp_path / "checkpoints", checkpoint):
        assert over_training(model, num_layers=4) == expected


def test_validation_takes_the_place_of_training_where_every_record_has_it(tmp_path: Path):
    recorded(tmp_path, [*RECORDS, {"step": 2, "val/lm_loss": 2.25}])
    assert [at["loss"] for at in over_training(tmp_path, num_layers=4)] == [2.25, 1.5]


def test_a_model_without_metrics_beside_it_has_no_way_to_show(tmp_path: Path):
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    assert over_training(tmp_path / "a" / "b" / "c", num_layers=4) == []
