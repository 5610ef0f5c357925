"""Sums of cosines without a matrix of pairs, against every pair by itself."""

import pytest
import torch
import torch.nn.functional as F

from nemo_pre.losses.pairwise_cosine import pair_cosines, pair_cosines_within_images


def test_every_pair_of_different_tokens_of_an_image_counts_twice():
    generator = torch.Generator().manual_seed(2)
    tokens, image = torch.randn(9, 5, generator=generator), torch.tensor([0, 0, 0, 4, 4, 4, 4, 7, 2])
    expected, pairs = 0.0, 0
    for i in range(9):
        for j in range(9):
            if i != j and image[i] == image[j]:
                expected += F.cosine_similarity(tokens[i], tokens[j], dim=0).item()
                pairs += 1
    found, count = pair_cosines_within_images(tokens, image)
    assert count == pairs == 6 + 12
    assert found.item() == pytest.approx(expected, abs=1e-5)
    assert pair_cosines_within_images(tokens[:0], image[:0])[1] == 0


def test_sets_are_summed_apart_and_a_single_token_has_no_pair():
    units = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(3)).double(), dim=-1)
    gram = units @ units.T
    sums = torch.stack([units[:5].sum(0), units[5]])
    cosines, pairs = pair_cosines(sums, torch.tensor([5, 1]))
    assert pairs.tolist() == [20, 0]
    assert cosines.tolist() == pytest.approx([float(gram[:5, :5].sum() - gram[:5, :5].trace()), 0.0], abs=1e-12)
    assert pair_cosines(sums[0], 5)[1] == 20
