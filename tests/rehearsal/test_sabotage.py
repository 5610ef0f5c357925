"""Faults that a run would meet on its GPUs only, each found by a rehearsal of a few layers.

One server has imported NeMo for all of them; a rank takes a few seconds.
"""

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.launch.ranks import RankFailure
from nemo_pre.rehearsal.run import Wishes, run_rehearsal
from nemo_pre.rehearsal.tables import describe

TWO_STAGES = ["experiment=digits_tiny_pre", "parallel=pp2"]
ONE = ["experiment=digits_tiny_pre", "parallel=single"]


def rehearsed(words, fault=None, messages=False, layers=2, stages=None):
    entry = {} if fault is None else {"entry": f"tests.rehearsal.sabotage:{fault}"}
    wishes = Wishes(layers=layers, stages=stages, messages=messages, jobs=2, named_from=1 << 12, **entry)
    return run_rehearsal(compose_run(words), wishes)


@pytest.fixture(scope="module")
def sound():
    """Two stages as they are."""
    return rehearsed(TWO_STAGES, messages=True)


def test_a_sound_run_comes_to_its_end_and_says_what_it_did(sound):
    assert sound.met is not None and sound.met.problem is None
    assert sound.met.messages > 0 and sound.met.collectives > 0
    assert all(len(found.peaks) == 2 and found.growth < 4096 for found in sound.found)
    for beside, found in zip(sound.besides, sound.found, strict=True):
        for kind in ("weights", "gradients", "optimizer"):
            assert beside.measured[kind] == pytest.approx(beside.planned[kind], rel=0.01)  # Megatron pads its buffers
        assert found.kernels > 0 and found.flops > 0
        assert found.forward_flops[0] == pytest.approx(beside.forward[0][1], rel=0.01)
    first, second = sound.calls
    sent = next(each for each in first if (each.kind, each.group) == ("send", "pipeline"))
    received = next(each for each in second if (each.kind, each.group) == ("recv", "pipeline"))
    assert (sent.number, sent.bytes) == (received.number, received.bytes)
    assert (
        sent.planned is not None and 0.7 * sent.planned <= sent.bytes <= sent.planned
    )  # one micro-batch has no anchor
    text = describe(sound)
    assert "not covered: " in text and "verified on a GPU: never" in text
    assert any("nemo_pre/neva/model.py" in line for line, _ in sound.found[0].waits + sound.found[0].lines_at_peak)


def test_a_tensor_left_on_the_host_is_found_with_its_line():
    with pytest.raises(RankFailure, match=r"cuda:0, cpu") as failure:
        rehearsed([*ONE, "model.rope=2d"], "tensor_on_the_host")
    assert "tests/rehearsal/sabotage.py" in failure.value.traceback


def test_swapped_calls_of_two_stages_are_found_and_named():
    found = rehearsed(TWO_STAGES, "message_order", messages=True)
    assert found.met is not None and found.met.problem in found.problems
    assert "rank 0 waits for rank 1" in found.met.problem and "anchor_exchange.py" in found.met.problem


def test_a_collective_of_objects_that_one_rank_leaves_out_is_named():
    with pytest.raises(RankFailure, match="waits in all_gather_object number .* of 2 ranks"):
        rehearsed(TWO_STAGES, "objects_without_answer", messages=True)


def test_what_is_held_longer_than_its_step_is_a_leak():
    found = rehearsed(ONE, "leak")
    leak = next(problem for problem in found.problems if "more are held after a step" in problem)
    assert "nemo_pre/" in leak or "megatron/" in leak
    assert found.found[0].growth > 4096


def test_a_wrong_shape_under_tensor_parallelism_of_eight_ends_the_rehearsal():
    words = ["experiment=siglip2_qwen25_72b_stage2_full_pre", "parallel=tp8_pp4_sp"]
    with pytest.raises(RankFailure, match=r"shape|size|expand|match"):
        rehearsed(words, "wrong_shape", stages=[0], layers=4)


def test_a_layer_that_keeps_its_output_twice_makes_the_plan_too_low():
    found = rehearsed(ONE, "layer_kept_twice")
    assert any("under the rehearsed peak" in problem for problem in found.problems)
    assert any("sabotage" not in line and size > 0 for line, size in found.found[0].lines_at_peak)
