"""PRe and VIRAL on models of Megatron-Core's own agree with the oracle as they do on ours.

``LLaVAModel`` refuses sequence and context parallelism without Transformer Engine, so on a CPU they are not tried.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.backend import BACKEND, CORE
from tests.parity import test_viral_parity as viral
from tests.parity.test_parity import GRADIENT, case, check, disagreements, oracle, run

pytestmark = [
    pytest.mark.core,
    pytest.mark.skipif(BACKEND != CORE, reason="Megatron-Core 0.15.3 has no HybridModel: make test-core"),
]
HYBRID = ("one-rank", "TP2-SP", "PP2", "PP2-VPP2", "CP2", "DP2-sharded-optimizer")
LLAVA = ("one-rank", "TP2", "PP2", "PP2-VPP2", "DP2-sharded-optimizer")
KINDS = [("hybrid", layout) for layout in HYBRID] + [("llava", layout) for layout in LLAVA]


@pytest.mark.parametrize("kind, layout", KINDS)
def test_pre_at_the_first_and_the_last_but_one_block(kind, layout):
    job, config = case(layout, (1, 3))
    check(replace(job, model_kind=kind), config)


@pytest.mark.parametrize("kind, layout", [("hybrid", "PP2"), ("llava", "one-rank"), ("llava", "PP2")])
@pytest.mark.parametrize("pre", [{"variant": "global"}, {"anchor": "pre_projector"}], ids=lambda pre: next(iter(pre)))
def test_pre_of_whole_images_and_of_the_encoders_features(kind, layout, pre):
    job, config = case(layout, (2,), pre=pre)
    check(replace(job, model_kind=kind), config)


@pytest.mark.parametrize(
    "kind, layout", [("hybrid", "PP2"), ("llava", "PP2-VPP2"), ("llava", "TP2"), ("hybrid", "CP2")]
)
def test_viral_with_its_target_read_beside_the_images(kind, layout):
    job, config = viral.case(layout, viral.SIMILARITY)
    viral.check(replace(job, model_kind=kind), config)


@pytest.mark.parametrize("kind", ["hybrid", "llava"])
def test_a_gradient_twice_too_large_is_noticed(kind):
    job, config = case("PP2", (3,))
    wrong = disagreements(
        run(replace(job, model_kind=kind, gradient_factor=2.0))[0], oracle(job.state, config, job.steps[0])
    )
    assert len(wrong) > 30
    assert min(wrong.values()) > 100 * GRADIENT
