"""Images with different numbers of visual tokens: losses and gradients agree with the oracles, which take one image at
a time. Tolerances as in the tests of fixed resolution."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.parity import test_laver_parity as laver_parity
from tests.parity import test_parity as parity
from tests.reference import tiny
from tests.reference.neva_laver import LaVerReferenceConfig


def native(job, config, family="qwen25_vl"):
    """The case with another tower, and with images of several sizes, of which some are cut off."""
    fields = tiny.NATIVE[family]
    vision = {"vision": tiny.native_vision(family), "feature_layer": fields["feature_layer"]}
    config = replace(config, max_sequence_length=16, drop_class_token=False, **vision)
    steps = [
        [
            [tiny.with_native_images(batch, 1000 * s + 100 * r + m, family) for m, batch in enumerate(rank)]
            for r, rank in enumerate(step)
        ]
        for s, step in enumerate(job.steps)
    ]
    state = tiny.random_state(config)
    assert any(len({size for b in rank for size in tiny.image_sizes(b)}) > 2 for step in steps for rank in step)
    return replace(job, steps=steps, state=state, vision=fields, max_length=16), config


@pytest.mark.parametrize(
    "family, layout",
    [
        *(("qwen25_vl", layout) for layout in ("one-rank", "TP2-SP", "PP2", "CP2", "TP2-SP-PP2-CP2-DP2")),
        *(("aimv2_native", layout) for layout in ("one-rank", "TP2-SP-PP2-CP2-DP2")),
    ],
)
def test_losses_and_gradients_of_pre_and_laver_with_four_uneven_micro_batches(family, layout):
    """Grids that are not square, images of one token, micro-batches of text."""
    job, config = native(*laver_parity.case(layout), family)
    assert isinstance(config, LaVerReferenceConfig)
    job = replace(job, teacher=tiny.random_teacher(config, seed=5), bucket_size=1)  # one order of gradients
    answers = laver_parity.check(job, config)
    assert sum(answer["masked"] for answer in answers) > 10


@pytest.mark.parametrize("family", tiny.NATIVE)
@pytest.mark.parametrize("pre", [{"variant": "global"}, {"anchor": "pre_projector"}])
def test_pre_of_whole_images_and_of_the_towers_features(pre, family):
    parity.check(*native(*parity.case("one-rank", (3,), pre=pre), family))
