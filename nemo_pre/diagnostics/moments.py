"""Means and covariances of a stream of tokens, and what is read off them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Moments:
    """Count, means ``[D]`` and scatter ``sum_i (x_i - mean x)(y_i - mean y)^T`` ``[D, E]`` in float64.

    Source: the update of Chan, Golub and LeVeque (1983), which does not cancel as sums of squares do.
    """

    count: int
    mean: Tensor
    mean_y: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor | None = None) -> Moments:
        """Moments of rows ``x [n, D]`` with themselves, or with ``y [n, E]``; n may be 0."""
        x = x.double()
        y = x if y is None else y.double()
        mean, mean_y = (rows.sum(0) / max(len(rows), 1) for rows in (x, y))
        return cls(len(x), mean, mean_y, (x - mean).T @ (y - mean_y))

    def merge(self, other: Moments) -> Moments:
        """Moments of the rows of both."""
        count = self.count + other.count
        if count == 0:
            return self
        share = other.count / count
        gap, gap_y = other.mean - self.mean, other.mean_y - self.mean_y
        between = torch.outer(gap, gap_y) * (self.count * share)
        return Moments(
            count, self.mean + share * gap, self.mean_y + share * gap_y, self.scatter + other.scatter + between
        )


def merged(one: Moments | None, two: Moments) -> Moments:
    """Moments of the rows of both, where the first may not have begun."""
    return two if one is None else one.merge(two)


def effective_dimension(moments: Moments, share: float = 0.95) -> int:
    """The fewest principal components that hold ``share`` of the centred variance; 0 without variance.

    Source: PRe (arXiv 2603.20808) eq. 6.
    """
    variances = torch.linalg.eigvalsh(moments.scatter).flip(0).clamp(min=0)
    total = variances.sum()
    if total <= 0:
        return 0
    held = variances.cumsum(0) / total
    return int((held < share).sum()) + 1


def redundancy(moments: Moments) -> float | None:
    """Mean absolute Pearson correlation between two different dimensions; a dimension without variance has none and is
    left out; None if fewer than two are left.

    Source: PRe (arXiv 2603.20808) eq. 7.
    """
    variances = moments.scatter.diagonal()
    varies = variances > 0
    size = int(varies.sum())
    if size < 2:
        return None
    scale = variances[varies].rsqrt()
    correlation = moments.scatter[varies][:, varies] * scale[:, None] * scale
    return float((correlation.abs().sum() - correlation.diagonal().abs().sum()) / (size * (size - 1)))


def length(moments: Moments) -> float:
    """Root mean square of the tokens' Euclidean lengths; 0 without tokens."""
    return float(_mean_product(moments) ** 0.5)


def relative_distance(x: Moments, y: Moments, cross: Moments) -> float | None:
    """Root mean square distance of two representations of the same tokens, over the second one's length; None where
    that is 0.

    Args:
        x, y: moments of each with itself, of the same width.
        cross: moments of the one with the other.
    """
    of_y = _mean_product(y)
    if of_y <= 0:
        return None
    return float(((_mean_product(x) + of_y - 2 * _mean_product(cross)).clamp(min=0) / of_y) ** 0.5)


def _mean_product(moments: Moments) -> Tensor:
    """Mean of x_i . y_i."""
    return moments.scatter.trace() / max(moments.count, 1) + moments.mean @ moments.mean_y


def linear_cka(x: Moments, y: Moments, cross: Moments) -> float | None:
    """Linear centred kernel alignment of two representations of the same tokens, 0 to 1; None without variance.

    Args:
        x, y: moments of each with itself.
        cross: moments of the one with the other.

    Source: Kornblith et al. (arXiv 1905.00414), in feature space.
    """
    norm = x.scatter.norm() * y.scatter.norm()
    return float(cross.scatter.square().sum() / norm) if norm > 0 else None
