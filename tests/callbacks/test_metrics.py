"""metrics.jsonl: what it holds, what a resume cuts, and that a disk that refuses never stops a run."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_pre.callbacks.metrics import MetricsCallback, RunTensorBoard, record_metrics
from nemo_pre.run_files.metrics import METRICS, MetricsFile, read_metrics


def trainer_at(step: int, metrics: dict[str, float] | None = None, rank: int = 0, **more: Any) -> Any:
    return SimpleNamespace(
        global_step=step,
        max_steps=10,
        is_global_zero=rank == 0,
        callback_metrics=metrics or {},
        loggers=[],
        callbacks=[],
        **more,
    )


def train_steps(callback: MetricsCallback, steps: range, rank: int = 0) -> None:
    for step in steps:
        callback.on_train_batch_start(trainer_at(step - 1, rank=rank), None, None)
        logged = {"reduced_train_loss": 1.0 / step, "step": step, "global_step": step}
        callback.on_train_batch_end(trainer_at(step, logged, rank))


def steps_in(directory: Path) -> list[int]:
    return [line["step"] for line in read_metrics(directory / METRICS)]


def test_a_line_has_readable_names_and_the_speed(tmp_path: Path) -> None:
    train_steps(MetricsCallback(tmp_path, every=1, global_batch_size=8), range(1, 2))
    (line,) = read_metrics(tmp_path / METRICS)
    assert line["step"] == 1
    assert line["lm/loss"] == 1.0
    assert line["samples_per_second"] == pytest.approx(8 / line["step_time"])
    assert set(line) == {"step", "time", "lm/loss", "step_time", "samples_per_second"}


def test_lines_come_every_few_steps_and_at_the_last(tmp_path: Path) -> None:
    train_steps(MetricsCallback(tmp_path, every=4, global_batch_size=8), range(1, 11))
    assert steps_in(tmp_path) == [4, 8, 10]


def test_only_rank_0_writes(tmp_path: Path) -> None:
    train_steps(MetricsCallback(tmp_path, every=1, global_batch_size=8), range(1, 3), rank=1)
    assert not (tmp_path / METRICS).exists()


def test_a_resume_cuts_what_lies_behind_the_checkpoint(tmp_path: Path) -> None:
    train_steps(MetricsCallback(tmp_path, every=1, global_batch_size=8), range(1, 8))
    resumed = MetricsCallback(tmp_path, every=1, global_batch_size=8)
    resumed.on_train_start(trainer_at(4), None)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6, 7], "a start that trains nothing leaves the record"
    train_steps(resumed, range(5, 7))
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_resumed_run_cuts_at_its_first_step_although_it_records_later(tmp_path: Path) -> None:
    train_steps(MetricsCallback(tmp_path, every=1, global_batch_size=8), range(1, 8))
    resumed = MetricsCallback(tmp_path, every=9, global_batch_size=8)
    resumed.on_train_start(trainer_at(4), None)
    train_steps(resumed, range(5, 6))
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_torn_last_line_is_dropped_by_the_resume(tmp_path: Path) -> None:
    file = tmp_path / METRICS
    file.write_text('{"step": 1, "time": 0, "lm/loss": 2.5}\n{"step": 2, "lm/lo')
    resumed = MetricsFile(file)
    resumed.cut_behind(2)
    resumed.append(2, {"lm/loss": 2.0})
    assert [json.loads(line)["lm/loss"] for line in file.read_text().splitlines()] == [2.5, 2.0]


def test_a_loss_that_is_not_finite_stays_valid_json(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / METRICS)
    file.append(1, {"lm/loss": math.nan, "grad_norm": math.inf})
    text = file.path.read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert read_metrics(file.path)[0]["lm/loss"] is None


def test_a_file_that_cannot_be_written_gives_one_warning_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "run"
    directory.write_text("a file where the directory should be")  # refuses root as well
    callback = MetricsCallback(directory, every=1, global_batch_size=8)
    with caplog.at_level(logging.WARNING):
        callback.on_train_start(trainer_at(0), None)
        train_steps(callback, range(1, 6))
    assert len(caplog.records) == 1
    assert "Training goes on" in caplog.text
    directory.unlink()  # and once the disk is writable again, so is the record
    train_steps(callback, range(6, 8))
    assert steps_in(directory) == [6, 7]


def test_a_full_disk_gives_one_warning_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    callback = MetricsCallback("unused", every=1, global_batch_size=8)
    callback.file = MetricsFile(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        train_steps(callback, range(1, 4))
    assert [record.message.count("No space left") for record in caplog.records] == [1]


def test_validation_results_get_a_line_of_their_own(tmp_path: Path) -> None:
    callback = MetricsCallback(tmp_path, every=1, global_batch_size=8)
    trainer = trainer_at(3)
    trainer.callbacks = [callback]
    seen: list[Any] = []
    trainer.loggers = [SimpleNamespace(log_metrics=lambda metrics, step: seen.append((metrics, step)))]
    record_metrics(trainer, {"val/exact_match": 0.5})
    (line,) = read_metrics(tmp_path / METRICS)
    assert (line["step"], line["val/exact_match"]) == (3, 0.5)
    assert seen == [({"val/exact_match": 0.5}, 3)]


def test_tensorboard_gets_readable_names_and_never_stops_a_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = RunTensorBoard(tmp_path)
    logger.log_metrics({"reduced_train_loss": 2.0}, step=1)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("lm/loss")] == [2.0]

    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the directory should be")
    with caplog.at_level(logging.WARNING):
        logger = RunTensorBoard(blocked)
        logger.log_metrics({"reduced_train_loss": 2.0}, step=1)
        logger.log_metrics({"reduced_train_loss": 2.0}, step=2)
        logger.save()
        logger.finalize("success")
    assert sum("TensorBoard" in record.message for record in caplog.records) == 1


def test_wandb_gets_readable_names_and_a_resumed_run_goes_on_in_its_record(tmp_path, monkeypatch):
    import wandb

    from nemo_pre.callbacks.metrics import RunWandb
    from nemo_pre.config.compose import compose_run

    options = ["experiment=digits_tiny", f"output_dir={tmp_path}", "trainer.wandb_project=seeing"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids = []
    for step in (1, 2):
        logger = RunWandb(compose_run(options))
        logger.log_metrics({"reduced_train_loss": 0.5}, step)
        assert logger.experiment.summary["lm/loss"] == 0.5
        ids.append((logger.experiment.id, logger.experiment.project, logger.experiment.config["name"]))
        wandb.finish()
    assert ids == [(ids[0][0], "seeing", "digits_tiny")] * 2
    assert list((tmp_path / "wandb").glob(f"offline-run-*-{ids[0][0]}/*.wandb"))
