"""The probe from streamed moments is scikit-learn's ridge regression on all images at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemo_pre.diagnostics.probe import ALPHAS, FOLDS, ProbeFit, ProbeScore, ProbeTask

COUNT, PRESENCE = ProbeTask("count", 3), ProbeTask("presence", 2, several=True)
TASKS = (COUNT, PRESENCE)


def problem(n: int, seed: int, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features from which three classes and two indicators can be guessed, but not read."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 3, (n,), generator=generator)
    presence = torch.randint(0, 2, (n, 2), generator=generator).double()
    truth = torch.cat([torch.nn.functional.one_hot(label, 3).double(), presence], dim=1)
    mixing = torch.randn(5, 8, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    features = truth @ mixing + noise * torch.randn(n, 8, generator=generator, dtype=torch.float64) + 20.0
    return features, truth


def fitted(features: torch.Tensor, truth: torch.Tensor, batches: int = 7) -> ProbeFit:
    fit = ProbeFit(TASKS)
    for rows in torch.arange(len(features)).tensor_split(batches):
        fit.update(features[rows], truth[rows], rows)
    return fit


def by_sklearn(features: torch.Tensor, truth: torch.Tensor, columns: slice) -> tuple[float, np.ndarray]:
    """The best alpha by held-out squared error, and the predictions on a test set of a fit on everything."""
    from sklearn.linear_model import Ridge

    x, y = features.numpy(), truth.numpy()[:, columns]
    fold = np.arange(len(x)) % FOLDS

    def ridge(rows: np.ndarray, alpha: float) -> Ridge:
        penalty = alpha * x[rows].var(axis=0).mean() * len(rows)
        return Ridge(alpha=penalty).fit(x[rows], y[rows])

    def error(alpha: float) -> float:
        parts = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in range(FOLDS)]
        return sum(((ridge(train, alpha).predict(x[held]) - y[held]) ** 2).sum() for train, held in parts)

    best = min(ALPHAS, key=error)
    return best, ridge(np.arange(len(x)), best).predict(problem(40, seed=2)[0].numpy())


@pytest.mark.parametrize("noise", [0.01, 3.0])
def test_the_probe_is_cross_validated_ridge_regression(noise):
    features, truth = problem(60, seed=1, noise=noise)
    probe = fitted(features, truth).solve()
    predicted = probe.predict(problem(40, seed=2)[0]).numpy()
    for number, columns in enumerate((slice(0, 3), slice(3, 5))):
        alpha, expected = by_sklearn(features, truth, columns)
        assert probe.alphas[number] == alpha
        np.testing.assert_allclose(predicted[:, columns], expected, rtol=0, atol=1e-7)


def test_accuracy_is_counted_on_test_images_with_its_interval_and_the_most_frequent_answer():
    probe = fitted(*problem(60, seed=1)).solve()
    features, truth = problem(80, seed=3)
    parts = [ProbeScore(probe), ProbeScore(probe), ProbeScore(probe)]
    for part, rows in zip(parts, torch.arange(80).tensor_split(3), strict=True):
        part.update(features[rows], truth[rows])
    found = parts[0].with_tallies([part.tally for part in parts]).result()
    predicted = probe.predict(features)
    right = float((predicted[:, :3].argmax(1) == truth[:, :3].argmax(1)).double().mean())
    each = float(((predicted[:, 3:] > 0.5) == (truth[:, 3:] > 0.5)).double().mean())
    frequent = int(probe.mean_y[:3].argmax())
    assert found["count"]["accuracy"] == pytest.approx(right)
    assert found["presence"]["accuracy"] == pytest.approx(each)
    assert found["count"]["most_frequent"] == pytest.approx(
        float((truth[:, :3].argmax(1) == frequent).double().mean())
    )
    assert found["count"]["low"] < right < found["count"]["high"]
    assert found["count"]["accuracy"] > found["count"]["most_frequent"]


def test_features_without_variance_give_the_most_frequent_answer():
    _, truth = problem(30, seed=1)
    probe = fitted(torch.ones(30, 8), truth).solve()
    score = ProbeScore(probe)
    score.update(torch.ones(30, 8), truth)
    assert all(task["accuracy"] == task["most_frequent"] for task in score.result().values())


def test_one_image_is_too_few_to_fit_on():
    features, truth = problem(1, seed=1)
    with pytest.raises(ValueError, match="at least two images"):
        fitted(features, truth, batches=1).solve()
