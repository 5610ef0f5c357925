"""The clocks of a step's parts, with a clock that ticks once whenever it is looked at."""

import itertools

import pytest
import torch
from torch import nn

from benchmarks.step_shares import BACKWARD, FORWARD, STEP, Clocks, shares


@pytest.fixture
def clocks(monkeypatch) -> Clocks:
    ticks = itertools.count()
    clocks = Clocks(on_gpu=False)
    monkeypatch.setattr(clocks, "now", lambda: next(ticks) / 1000)  # milliseconds
    return clocks


class Tuple(nn.Module):
    """As Megatron's layers: a result and a bias that is added elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.linear(hidden_states), None


def test_a_parts_time_is_that_within_its_modules_in_both_passes(clocks):
    first, second = nn.Linear(2, 2), Tuple()
    clocks.watch("first", [first])
    clocks.watch("second", [second])
    inputs = torch.ones(1, 2, requires_grad=True)
    for _ in range(2):  # micro-batches
        hidden_states = first(inputs)
        output, _ = second(hidden_states=hidden_states)
        output += 1  # in place, as Megatron's residuals
        output.sum().backward()
    taken = clocks.take()
    # Backward ticks: the second's begin; at the tensor between them the first's begin and the second's end; its end.
    assert taken["first"] == taken["second"] == {FORWARD: pytest.approx(2 * 1), BACKWARD: pytest.approx(2 * 2)}
    assert clocks.take()["first"] == {FORWARD: 0, BACKWARD: 0}


def test_a_module_without_an_input_that_needs_a_gradient_is_seen_forward_alone(clocks):
    module = nn.Linear(2, 2)
    clocks.watch("encoder", [module])
    module(torch.ones(1, 2)).sum().backward()
    assert clocks.take() == {"encoder": {FORWARD: pytest.approx(1)}}


def test_a_methods_time_and_result_are_kept(clocks):
    class Optimizer:
        def step(self, scale: int) -> int:
            return 2 * scale

    optimizer = Optimizer()
    clocks.wrap("optimizer", optimizer, "step")
    assert optimizer.step(scale=3) == 6
    assert clocks.take() == {"optimizer": {STEP: pytest.approx(1)}}


def test_shares_are_of_the_median_step_and_the_rest_is_what_is_left():
    steps = [(step, {"MLP": {FORWARD: step / 10, BACKWARD: step / 5}}) for step in (90.0, 100.0, 900.0)]
    assert shares(steps) == {
        "step_ms": 100.0,
        "parts": {"MLP": {"forward_ms": 10.0, "backward_ms": 20.0, "share": 0.3}, "rest": {"share": 0.7}},
    }
