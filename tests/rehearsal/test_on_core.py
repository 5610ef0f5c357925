"""A loop on plain Megatron-Core, rehearsed: the plan holds there too, and all ranks' calls meet."""

from __future__ import annotations

import pytest

from nemo_pre.config.compose import compose_run
from nemo_pre.rehearsal.rehearse import rehearse
from nemo_pre.rehearsal.run import Wishes, run_rehearsal
from tests.backend import BACKEND, CORE

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(BACKEND != CORE, reason="with NeMo its own training is rehearsed: make test-core"),
]
CASES = {
    "PRe over two stages": (["experiment=digits_tiny_pre", "parallel=pp2"], None),
    "LaVer over tensor ranks": (["experiment=digits-laver", "parallel=tp2_sp"], 4),
    "VIRAL over interleaved stages": (["experiment=digits-viral", "parallel=pp2_vpp2"], None),
}


@pytest.mark.parametrize("words, layers", CASES.values(), ids=CASES)
def test_the_plan_holds_and_the_ranks_meet(words, layers):
    """At full depth, or as many layers: of fewer, what a plan rounds up is over 3% of ten megabytes."""
    found = run_rehearsal(compose_run(words), Wishes(layers=layers, jobs=2))
    assert found.problems == [] and found.met is not None and found.met.messages + found.met.collectives > 0
    assert found.backend.startswith("Megatron-Core 0.19")
    for beside, rank in zip(found.besides, found.found, strict=True):
        assert 0 <= beside.over < 0.03, beside.place
        assert len(rank.peaks) == 2 and rank.kernels > 0 and all(rank.forward_flops)


def test_a_loop_of_ones_own_is_what_comes_next(capsys):
    rehearse(["experiment=digits_tiny_pre", "parallel=single", "layers=1"])
    said = capsys.readouterr().out
    assert (
        "trained by Megatron-Core 0.19" in said
        and "multi_tensor_scale_tensor" in said
        and said.rstrip().endswith("next: a loop of your own")
    )
