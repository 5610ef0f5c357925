"""The progress line: its text, and one rewritten line on a terminal against plain lines in a log."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_pre.callbacks.progress import ProgressCallback, duration, progress_line


def test_the_line_by_hand() -> None:
    line = progress_line(
        40,
        600,
        {"lm/loss": 2.34567, "pre/cosine": 0.5, "grad_norm": 12.0, "lr": 1e-3},
        samples_per_second=23.456,
        tokens_per_second=2251.7,
        seconds_left=3725,
    )
    assert line == (
        "step 40/600 | loss 2.346 | pre/cosine 0.5 | grad_norm 12 | 23.5 samples/s | 2,252 tokens/s | ETA 1h02m"
    )


def test_without_pre_there_is_no_cosine() -> None:
    assert "cosine" not in progress_line(1, 2, {"lm/loss": 1.0}, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m00s"), (247, "4m07s"), (3599.7, "1h00m"), (float("nan"), "?")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def run(monkeypatch: pytest.MonkeyPatch, stream: Any, steps: int = 6, log_every: int = 2, rank: int = 0) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    progress = ProgressCallback(log_every, global_batch_size=4)
    trainer: Any = SimpleNamespace(
        global_step=0, max_steps=steps, is_global_zero=rank == 0, callback_metrics={"reduced_train_loss": 2.0}
    )
    progress.on_train_start(trainer, None)
    for step in range(1, steps + 1):
        progress.on_train_batch_start(trainer)
        micro_batch = SimpleNamespace(plan=SimpleNamespace(sequence_length=96))
        progress.on_megatron_microbatch_start(None, {"micro_batch": micro_batch}, forward_callback=None)
        trainer.global_step = step
        progress.on_train_batch_end(trainer)
    progress.say("validated")
    progress.on_train_end(trainer, None)


def test_a_log_gets_a_plain_line_every_few_steps_and_at_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False)
    run(monkeypatch, stream, steps=5)
    lines = stream.getvalue().splitlines()
    assert [line.split(" |")[0] for line in lines[1:-1]] == ["step 2/5", "step 4/5", "step 5/5"]
    assert "\r" not in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


def test_a_terminal_gets_one_rewritten_line_and_what_is_said_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=True)
    run(monkeypatch, stream)
    start, rest = stream.getvalue().split("\n", 1)
    assert start == "training from step 0 to 6"
    states = rest.split("\r\x1b[K")
    assert [state.split(" |")[0] for state in states[1:]] == ["step 2/6", "step 4/6", "step 6/6", "validated\n"]
    assert rest.count("\n") == 1


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Stream(terminal=False)
    monkeypatch.setattr(sys, "stdout", stream)
    progress = ProgressCallback(1, global_batch_size=4)
    trainer: Any = SimpleNamespace(global_step=1, max_steps=2, is_global_zero=False, callback_metrics={})
    progress.on_train_start(trainer, None)
    progress.on_train_batch_start(trainer)
    progress.on_train_batch_end(trainer)
    progress.on_train_end(trainer, None)
    assert stream.getvalue() == ""


def test_a_terminal_that_is_gone_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Stream):
        def write(self, text: str) -> int:
            raise OSError("Input/output error")

    run(monkeypatch, Gone(terminal=True))
