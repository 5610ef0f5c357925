"""A run's checkpoints are evaluated beside it: each complete one once, in order, until the last."""

import inspect
import json

import pytest

from nemo_pre.evaluation.evaluate import evaluate
from nemo_pre.evaluation.results import TaskResult
from nemo_pre.evaluation.watch import complete_checkpoints, evaluate_run, watch


class Run:
    """A run's directory as training leaves it, and what was exported and evaluated."""

    def __init__(self, directory, max_steps):
        self.directory, self.exported, self.evaluated = directory, [], []
        directory.mkdir()
        (directory / "config.yaml").write_text(f"trainer: {{max_steps: {max_steps}}}\n")

    def save(self, step, unfinished=False, with_config=True):
        path = self.directory / "checkpoints" / f"step={step}"
        path.mkdir(parents=True)
        if with_config:
            (path / "config.yaml").touch()
        if unfinished:
            path.with_name(path.name + "-unfinished").touch()
        return path

    def export(self, checkpoint, out):
        self.exported.append((checkpoint, out))
        (self.directory / "exports" / checkpoint.rpartition("/")[2]).mkdir(parents=True)

    def evaluate(self, exported, out):
        self.evaluated.append((exported, out))
        return [TaskResult("digits", {}, {"exact_match,none": len(self.evaluated) / 10}, {})]

    def lines(self):
        return [json.loads(line) for line in (self.directory / "evaluations.jsonl").read_text().splitlines()]


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path / "run", max_steps=30)


def test_only_complete_checkpoints_count(run):
    run.save(10)
    run.save(20, unfinished=True)
    run.save(25, with_config=False)
    (run.directory / "checkpoints" / "step=10-last").mkdir()
    assert list(complete_checkpoints(run.directory)) == [10]


def test_every_checkpoint_is_evaluated_once_in_order_until_the_last(run):
    arrivals = [lambda: run.save(20), lambda: run.save(30)]
    run.save(10)
    watch(run.directory, run.export, run.evaluate, sleep=lambda seconds: arrivals.pop(0)())
    assert [line["step"] for line in run.lines()] == [10, 20, 30]
    assert [line["scores"]["digits/exact_match,none"] for line in run.lines()] == [0.1, 0.2, 0.3]
    assert run.evaluated[0] == (str(run.directory / "exports/step=10"), str(run.directory / "evaluations/step=10"))
    assert not (run.directory / "exports" / "step=10").exists()


def test_a_restarted_watcher_goes_on_where_it_was(run):
    run.save(10)
    watch(run.directory, run.export, run.evaluate, follow=False)
    run.save(20)
    watch(run.directory, run.export, run.evaluate, follow=False, keep_exports=True)
    assert [line["step"] for line in run.lines()] == [10, 20]
    assert (run.directory / "exports" / "step=20").exists()


def test_a_checkpoint_that_the_run_removes_meanwhile_is_passed_over(run, capsys):
    run.save(10)
    run.save(20)

    def export(checkpoint, out):
        if checkpoint.endswith("step=10"):
            (run.directory / "checkpoints/step=10/config.yaml").unlink()
            (run.directory / "checkpoints/step=10").rmdir()
            raise ValueError("it is gone")
        run.export(checkpoint, out)

    watch(run.directory, export, run.evaluate, follow=False)
    assert [line["step"] for line in run.lines()] == [20]
    assert "step 10: its checkpoint was removed" in capsys.readouterr().err


def test_an_export_that_fails_stops_the_watcher(run):
    run.save(10)

    def export(checkpoint, out):
        raise ValueError("no such model")

    with pytest.raises(ValueError, match="no such model"):
        watch(run.directory, export, run.evaluate, follow=False)


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run's directory"):
        watch(tmp_path, None, None)


def test_an_evaluation_of_a_run_takes_the_options_of_an_evaluation(run, monkeypatch):
    asked = {}

    def remember(model, suite, tasks, **rest):
        asked.update(model=model, suite=suite, tasks=tasks, **rest)
        return run.evaluate(model, rest["out"])

    monkeypatch.setattr("nemo_pre.evaluation.evaluate.evaluate", remember)
    monkeypatch.setattr("nemo_pre.huggingface.exporter.export_checkpoint", run.export)
    run.save(10)
    given = {"tasks": "gqa", "data": "d", "batch_size": 2, "device": "cpu", "limit": 3, "num_fewshot": 1}
    given |= {"processes": 2, "flags": "--seed 1", "python": "p", "missing": "skip"}
    evaluate_run(str(run.directory), follow=False, **given)
    exported, out = run.evaluated[0]
    assert asked == {"model": exported, "suite": "digits", "out": out, **given}
    assert asked.keys() == inspect.signature(evaluate).parameters.keys() - {"again", "published"}
