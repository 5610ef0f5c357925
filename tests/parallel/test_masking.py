"""Masks depend on seed, step, sample and image alone."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.objectives.laver.masks import visual_token_masks

IMAGES = [1, 0, 2, 1, 3, 0, 0, 1]  # of the samples of a global batch
TOKENS = 16


def global_masks(data_parallel: int, micro_batch_size: int, step: int = 3, ratio: float = 0.5) -> list[torch.Tensor]:
    """The masks of a global batch's samples, put together from all ranks and micro-batches of a layout."""
    masks: list[torch.Tensor] = [torch.empty(0)] * len(IMAGES)
    for index in range(len(IMAGES) // (data_parallel * micro_batch_size)):
        for rank in range(data_parallel):
            first = (index * data_parallel + rank) * micro_batch_size
            images = IMAGES[first : first + micro_batch_size]
            mask = visual_token_masks(images, [TOKENS] * sum(images), ratio, "bernoulli", 7, step, first)
            for sample, part in zip(range(first, len(IMAGES)), mask.split([n * TOKENS for n in images]), strict=False):
                masks[sample] = part
    return masks


@pytest.mark.parametrize("layout", [(1, 2), (1, 4), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_the_same_tokens_are_masked_in_every_layout(layout):
    expected = global_masks(1, 1)
    assert sum(int(mask.sum()) for mask in expected) > 20
    for found, right in zip(global_masks(*layout), expected, strict=True):
        assert torch.equal(found, right)


def test_every_step_image_and_sample_has_its_own_mask():
    masks = [mask for step in range(3) for sample in global_masks(1, 1, step) for mask in sample.view(-1, TOKENS)]
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks)


def test_bernoulli_masks_with_the_ratios_probability_and_count_masks_its_floor():
    bernoulli = visual_token_masks([200], [100] * 200, 0.3, "bernoulli", 0, 0, 0)
    share = bernoulli.float().mean().item()
    assert abs(share - 0.3) < 4 * (0.21 / 20000) ** 0.5
    assert bernoulli.view(200, 100).sum(1).unique().numel() > 5
    count = visual_token_masks([50], [29] * 50, 0.3, "count", 0, 0, 0)
    assert count.view(50, 29).sum(1).tolist() == [8] * 50  # floor(8.7)
    assert count.view(50, 29).float().mean(0).max() < 1  # not always the same tokens


def test_nothing_and_everything():
    assert visual_token_masks([0, 0], [], 0.5, "bernoulli", 0, 0, 0).shape == (0,)
    assert not visual_token_masks([1], [9], 0.0, "bernoulli", 0, 0, 0).any()
    assert visual_token_masks([1], [9], 1.0, "bernoulli", 0, 0, 0).all()
    with pytest.raises(ValueError, match="choose one of bernoulli, count"):
        visual_token_masks([1], [9], 0.5, "block", 0, 0, 0)
