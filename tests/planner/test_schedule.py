"""The simulated pipeline against formulas, and against what follows from the order of passes."""

from __future__ import annotations

from functools import cache
from statistics import fmean

import pytest

from nemo_pre.planner.schedule import Pass, bubble_fraction, order_of_passes, peak, simulate
from tests.planner.recorded_passes import record_passes
from tests.planner.shapes import tiny
from tests.ranks import run_on_standing_ranks


@pytest.mark.parametrize("stages", [2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [1, 2, 5])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_bubble_of_even_stages_is_the_formula(stages: int, chunks: int, rounds: int) -> None:
    micro_batches = stages * rounds
    simulated = simulate(stages, micro_batches, [[(1.0, 2.0)] * chunks] * stages)
    assert simulated.bubble == pytest.approx(bubble_fraction(stages, chunks, micro_batches))
    assert simulated.busy == pytest.approx([3.0 * chunks * micro_batches] * stages)


def test_one_slow_stage_sets_the_pace_of_all() -> None:
    times = [[(1.0, 2.0)], [(2.0, 4.0)], [(1.0, 2.0)]]
    simulated = simulate(3, 30, times)
    assert 30 * 6.0 < simulated.seconds < 30 * 6.0 + 10.0
    assert simulated.busy[1] == pytest.approx(30 * 6.0)


def test_the_bubble_of_uneven_stages_is_the_one_worked_out_by_hand() -> None:
    # second  1  2  3  4  5  6  7  8
    # stage 1 F0 F1 .  .  B0 .  .  B1
    # stage 2 .  F0 B0 B0 F1 B1 B1 .
    simulated = simulate(2, 2, [[(1.0, 1.0)], [(1.0, 2.0)]])
    assert simulated.seconds == pytest.approx(8.0)
    assert simulated.bubble == pytest.approx(1 - 6 / 8)


def test_a_transfer_is_waited_for_where_the_former_stage_is_another() -> None:
    alone = simulate(2, 1, [[(1.0, 1.0)]] * 2)
    assert simulate(2, 1, [[(1.0, 1.0)]] * 2, transfer=0.5).seconds == pytest.approx(alone.seconds + 2 * 0.5)
    assert simulate(1, 3, [[(1.0, 1.0)]], transfer=0.5).seconds == pytest.approx(6.0)


@pytest.mark.parametrize(("stages", "chunks", "micro_batches"), [(4, 1, 6), (4, 1, 2), (2, 2, 4), (4, 3, 8)])
def test_every_micro_batch_passes_every_chunk_forward_then_backward(stages, chunks, micro_batches) -> None:
    for stage in range(stages):
        order = order_of_passes(stage, stages, chunks, micro_batches)
        assert len(order) == len(set(order)) == 2 * chunks * micro_batches
        places = {(this.direction, this.chunk, this.micro_batch): place for place, this in enumerate(order)}
        for chunk in range(chunks):
            for number in range(micro_batches):
                assert places["F", chunk, number] < places["B", chunk, number]


def test_1f1b_holds_as_many_micro_batches_as_stages_lie_behind() -> None:
    for stage in range(4):
        most, in_flight = peak(stage, 4, 16, kept=[10.0], extra=[3.0])
        assert in_flight == [4 - stage]
        assert most == 10.0 * (4 - stage) + 3.0


def test_interleaving_holds_warm_up_and_one_more() -> None:
    for stage in range(4):
        most, in_flight = peak(stage, 4, 16, kept=[1.0, 1.0, 1.0], extra=[0.0] * 3)
        assert most == sum(in_flight) == (4 - stage - 1) * 2 + (3 - 1) * 4 + 1


MEGATRON = {
    "PP2, 3 micro-batches": ({"pipeline": 2}, 3),
    "PP4, 6 micro-batches": ({"pipeline": 4}, 6),
    "PP2 x VPP2, 4 micro-batches": ({"pipeline": 2, "virtual_pipeline": 2}, 4),
    "PP2 x VPP2, uneven": ({"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [1, 3, 3, 1]}, 4),
}


@pytest.mark.parametrize("name", MEGATRON)
def test_order_and_bubble_are_those_of_megatrons_passes_with_their_measured_times(name: str) -> None:
    """The passes that Megatron ran, in its order, give the same step when every one starts as soon as it can."""
    parallel, micro_batches = MEGATRON[name]
    layers = sum(parallel.get("pipeline_layers", [1] * 4))
    config = tiny(parallel=parallel, micro_batches=micro_batches, language={"num_layers": layers})
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    recorded = run_on_standing_ranks(record_passes, stages, config)
    for stage, passes in enumerate(recorded):
        assert [this for this, _ in passes] == list(order_of_passes(stage, stages, chunks, micro_batches))
    seconds = [
        [(mean_seconds(passes, "F", chunk), mean_seconds(passes, "B", chunk)) for chunk in range(chunks)]
        for passes in recorded
    ]
    finished = earliest_finish([[this for this, _ in passes] for passes in recorded], seconds)
    simulated = simulate(stages, micro_batches, seconds)
    assert simulated.seconds == pytest.approx(finished)
    busiest = max(micro_batches * sum(f + b for f, b in stage) for stage in seconds)
    assert simulated.bubble == pytest.approx(1 - busiest / finished) and simulated.bubble > 0


def mean_seconds(passes: list[tuple[Pass, float]], direction: str, chunk: int) -> float:
    return fmean(seconds for this, seconds in passes if (this.direction, this.chunk) == (direction, chunk))


def earliest_finish(orders: list[list[Pass]], seconds: list[list[tuple[float, float]]]) -> float:
    """The longest path through the passes: each waits for the one before it on its stage and for its input."""
    stages, chunks = len(orders), len(seconds[0])
    before = {}
    for stage, order in enumerate(orders):
        for place, this in enumerate(order):
            where = this.chunk * stages + stage
            step = 1 if this.direction == "B" else -1
            waits = [(stage, order[place - 1])] if place else []
            if 0 <= where + step < stages * chunks:
                chunk, former = divmod(where + step, stages)
                waits.append((former, Pass(this.direction, chunk, this.micro_batch)))
            elif this.direction == "B":
                waits.append((stage, Pass("F", this.chunk, this.micro_batch)))
            before[stage, this] = waits

    @cache
    def end(stage: int, this: Pass) -> float:
        start = max((end(*waited) for waited in before[stage, this]), default=0.0)
        return start + seconds[stage][this.chunk][this.direction == "B"]

    return max(end(*place) for place in before)


def test_interleaving_wants_a_multiple_of_the_stages() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        order_of_passes(0, 4, 2, 6)
