"""Measures from streamed moments equal what numpy says of all tokens at once."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
import torch

from nemo_pre.diagnostics.moments import (
    Moments,
    effective_dimension,
    length,
    linear_cka,
    redundancy,
    relative_distance,
)

CUTS = (0, 7, 8, 40, 40, 100)  # batches of every size, one of them empty


@pytest.fixture
def tokens() -> torch.Tensor:
    """Correlated, far from the origin, and of very different scales: where sums of squares would cancel."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64) * torch.tensor([5.0, 3, 2, 1, 0.3, 0.01])
    return torch.randn(100, 6, generator=generator, dtype=torch.float64) @ mixing.T + 1e4


def streamed(x: torch.Tensor, y: torch.Tensor | None = None) -> Moments:
    batches = [slice(start, end) for start, end in zip(CUTS, CUTS[1:], strict=False)]
    return reduce(Moments.merge, [Moments.of(x[rows], None if y is None else y[rows]) for rows in batches])


def test_streamed_moments_are_those_of_all_rows(tokens):
    other = tokens[:, :4].flip(0).sin()
    found = streamed(tokens, other)
    whole = np.cov(tokens.numpy(), other.numpy(), rowvar=False, bias=True)[:6, 6:] * 100
    assert found.count == 100
    np.testing.assert_allclose(found.mean, tokens.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.scatter, whole, rtol=1e-8, atol=1e-8)


def test_the_order_of_merging_does_not_matter(tokens):
    one, two, three = Moments.of(tokens[:10]), Moments.of(tokens[10:70]), Moments.of(tokens[70:])
    torch.testing.assert_close(one.merge(two).merge(three).scatter, three.merge(one.merge(two)).scatter)


@pytest.mark.parametrize("share", [0.5, 0.95, 0.999999])
def test_effective_dimension_counts_the_components_that_pca_needs(tokens, share):
    from sklearn.decomposition import PCA

    held = np.cumsum(PCA().fit(tokens.numpy()).explained_variance_ratio_)
    assert effective_dimension(streamed(tokens), share) == int(np.argmax(held >= share)) + 1


def test_effective_dimension_is_of_the_centred_tokens():
    line = torch.outer(torch.linspace(-1, 1, 9), torch.tensor([1.0, 2.0, 3.0])) + torch.tensor([50.0, -7.0, 3.0])
    assert effective_dimension(Moments.of(line)) == 1
    assert effective_dimension(Moments.of(torch.ones(5, 3))) == 0


def test_redundancy_is_the_mean_absolute_correlation_without_constant_dimensions(tokens):
    correlation = np.abs(np.corrcoef(tokens.numpy(), rowvar=False))
    expected = (correlation.sum() - 6) / 30
    assert redundancy(streamed(tokens)) == pytest.approx(expected, rel=1e-6)
    with_constant = torch.cat([tokens, torch.full((100, 1), 3.0, dtype=torch.float64)], dim=1)
    assert redundancy(streamed(with_constant)) == pytest.approx(expected, rel=1e-6)
    assert redundancy(Moments.of(torch.ones(4, 3))) is None


def test_length_and_distance_are_root_mean_squares_over_the_tokens(tokens):
    other = tokens.flip(1) * 1.001
    assert length(streamed(tokens)) == pytest.approx(float(tokens.square().sum(1).mean().sqrt()), rel=1e-12)
    gap = (tokens - other).square().sum(1).mean().sqrt() / other.square().sum(1).mean().sqrt()
    found = relative_distance(streamed(tokens), streamed(other), streamed(tokens, other))
    assert found == pytest.approx(float(gap), rel=1e-6)
    three_four = Moments.of(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    assert length(three_four) == pytest.approx(12.5**0.5)
    assert relative_distance(three_four, three_four, three_four) == 0.0
    nothing = Moments.of(torch.zeros(2, 2))
    assert relative_distance(three_four, nothing, Moments.of(torch.ones(2, 2), torch.zeros(2, 2))) is None


def test_linear_cka_is_the_alignment_of_the_centred_gram_matrices(tokens):
    other = (tokens[:, :4] - 1e4).tanh() + 0.1 * tokens[:, 2:]
    centring = torch.eye(100, dtype=torch.float64) - 1 / 100
    gram_x, gram_y = (centring @ rows @ rows.T @ centring for rows in (tokens, other))
    expected = float((gram_x * gram_y).sum() / (gram_x.norm() * gram_y.norm()))
    found = linear_cka(streamed(tokens), streamed(other), streamed(tokens, other))
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0.0 < found < 1.0


def test_linear_cka_ignores_rotation_scale_and_shift(tokens):
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    turned = 3 * tokens @ rotation + 5
    assert linear_cka(streamed(tokens), streamed(turned), streamed(tokens, turned)) == pytest.approx(1.0)
    constant = torch.ones_like(tokens)
    assert linear_cka(streamed(tokens), streamed(constant), streamed(tokens, constant)) is None
