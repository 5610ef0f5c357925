"""Linear probes on the mean of an image's visual tokens: what can still be read off a layer with a linear map.

Ridge regression of indicators (1 or 0) on the mean token, with an intercept. The fit needs second moments only, so
images stream by: those of the fit set once into ``FOLDS`` folds, then those of the test set through the classifier.
The penalty is ``alpha`` times the mean variance of the features, so that a layer's scale does not matter; ``alpha`` is
the one of ``ALPHAS`` with the smallest squared error on held-out folds. Accuracy is on test images alone.

Source: PRe (arXiv 2603.20808), its global functional degradation; the papers do not state how they fit their probes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from nemo_pre.diagnostics.moments import Moments, merged
from nemo_pre.diagnostics.replicas import Replicas
from nemo_pre.report.intervals import wilson

FOLDS = 5
ALPHAS = tuple(10.0**power for power in range(-6, 3))


@dataclass(frozen=True)
class ProbeTask:
    """``size`` indicators a probe predicts: of several classes one is right (the largest prediction), or, with
    ``several``, each is right or wrong by itself (predictions above one half)."""

    name: str
    size: int
    several: bool = False

    def correct(self, predicted: Tensor, truth: Tensor) -> Tensor:
        """The share of right decisions ``[n]`` for each image."""
        if self.several:
            return ((predicted > 0.5) == (truth > 0.5)).double().mean(1)
        return (predicted.argmax(1) == truth.argmax(1)).double()


@dataclass
class ProbeFit:
    """The fit set of one layer's probes, as moments of (features, indicators) by fold."""

    tasks: Sequence[ProbeTask]
    folds: list[Moments | None] = field(default_factory=lambda: [None] * FOLDS)

    def update(self, features: Tensor, truth: Tensor, number: Tensor) -> None:
        """Add images: features ``[n, D]``, indicators of all tasks side by side ``[n, C]``, and the images' numbers in
        the fit set ``[n]``, which choose the fold."""
        rows = torch.cat([features.double(), truth.to(features.device).double()], dim=1)
        for fold in (number % FOLDS).unique().tolist():
            chosen = (number % FOLDS == fold).to(features.device)
            self.folds[fold] = merged(self.folds[fold], Moments.of(rows[chosen]))

    def over(self, replicas: Replicas) -> ProbeFit:
        """The fit over the images of all replicas, which every replica gets."""
        width = next(len(moments.mean) for moments in self.folds if moments is not None)
        device = next(moments.mean.device for moments in self.folds if moments is not None)
        nothing = Moments.of(torch.zeros(0, width, device=device))
        folds = [replicas.summed(moments or nothing) for moments in self.folds]
        return ProbeFit(self.tasks, [moments if moments.count else None for moments in folds])

    def solve(self) -> LinearProbe:
        """The probes of all tasks, each with its own ``alpha``.

        Raises:
            ValueError: fewer than two folds have images.
        """
        folds = [moments for moments in self.folds if moments is not None]
        if len(folds) < 2:
            raise ValueError("A probe needs at least two images to be fitted on: raise num_fit.")
        width = len(folds[0].mean) - sum(task.size for task in self.tasks)
        errors = torch.zeros(len(ALPHAS), len(folds[0].mean) - width, dtype=torch.float64)
        for number, held_out in enumerate(folds):
            ridge = _Ridge(reduce(Moments.merge, folds[:number] + folds[number + 1 :]), width)
            errors += torch.stack([ridge.errors(ridge.weights(alpha), held_out).cpu() for alpha in ALPHAS])
        everything = _Ridge(reduce(Moments.merge, folds), width)
        alphas, weights, start = [], [], 0
        for task in self.tasks:
            columns = slice(start, start + task.size)
            alphas.append(ALPHAS[int(errors[:, columns].sum(1).argmin())])
            weights.append(everything.weights(alphas[-1])[:, columns])
            start += task.size
        return LinearProbe(self.tasks, torch.cat(weights, dim=1), everything.mean, everything.mean_y, alphas)


class _Ridge:
    """The solutions for every penalty, from one eigendecomposition."""

    def __init__(self, moments: Moments, width: int) -> None:
        self.mean, self.mean_y = moments.mean[:width], moments.mean[width:]
        self._width = width
        self._variances, self._axes = torch.linalg.eigh(moments.scatter[:width, :width])
        self._projected = self._axes.T @ moments.scatter[:width, width:]
        self._unit = float(self._variances.clamp(min=0).mean()) or 1.0  # without variance any penalty gives zeros

    def weights(self, alpha: float) -> Tensor:
        return self._axes @ (self._projected / (self._variances.clamp(min=0) + alpha * self._unit)[:, None])

    def errors(self, weights: Tensor, held_out: Moments) -> Tensor:
        """Sum of squared errors ``[C]`` on the rows behind ``held_out``."""
        width = self._width
        own, joint = held_out.scatter[:width, :width], held_out.scatter[:width, width:]
        of_truth = held_out.scatter[width:, width:].diagonal()
        centred = of_truth - 2 * (weights * joint).sum(0) + (weights * (own @ weights)).sum(0)
        gap = held_out.mean[width:] - self.mean_y - (held_out.mean[:width] - self.mean) @ weights
        return centred + held_out.count * gap.square()


@dataclass(frozen=True)
class LinearProbe:
    """``weights [D, C]`` on features less ``mean``, plus ``mean_y``, which is also the answer without looking."""

    tasks: Sequence[ProbeTask]
    weights: Tensor
    mean: Tensor
    mean_y: Tensor
    alphas: Sequence[float]

    def to(self, device: torch.device | str) -> LinearProbe:
        weights, mean, mean_y = self.weights.to(device), self.mean.to(device), self.mean_y.to(device)
        return LinearProbe(self.tasks, weights, mean, mean_y, self.alphas)

    def predict(self, features: Tensor) -> Tensor:
        """Indicators ``[n, C]``."""
        return (features.double() - self.mean) @ self.weights + self.mean_y


@dataclass
class ProbeScore:
    """Right decisions of a probe on test images, beside those of always answering what is most frequent."""

    probe: LinearProbe
    images: int = 0
    correct: list[float] = field(default_factory=list)
    by_frequency: list[float] = field(default_factory=list)

    def update(self, features: Tensor, truth: Tensor) -> None:
        """Add images: features ``[n, D]``, indicators ``[n, C]``."""
        truth = truth.to(features.device)
        predicted = self.probe.predict(features)
        constant = self.probe.mean_y.expand_as(predicted)
        self.images += len(features)
        self.correct = _added(self.correct, self._by_task(predicted, truth))
        self.by_frequency = _added(self.by_frequency, self._by_task(constant, truth))

    def _by_task(self, predicted: Tensor, truth: Tensor) -> list[float]:
        sizes = [task.size for task in self.probe.tasks]
        parts = zip(self.probe.tasks, predicted.split(sizes, dim=1), truth.split(sizes, dim=1), strict=True)
        return [float(task.correct(*pair).sum()) for task, *pair in parts]

    @property
    def tally(self) -> tuple[int, list[float], list[float]]:
        return self.images, self.correct, self.by_frequency

    def with_tallies(self, tallies: Sequence[tuple[int, list[float], list[float]]]) -> ProbeScore:
        """This probe's score on the images of several parts."""
        images, correct, by_frequency = zip(*tallies, strict=True)
        return ProbeScore(self.probe, sum(images), reduce(_added, correct, []), reduce(_added, by_frequency, []))

    def result(self) -> dict[str, dict[str, Any]]:
        """Each task's accuracy with its 95% interval (Wilson's for as many decisions as images: wider than needed for
        a mean over ``several``), the accuracy of the most frequent answer, and the chosen ``alpha``."""
        results = {}
        for number, task in enumerate(self.probe.tasks):
            if self.images:
                accuracy = self.correct[number] / self.images
                low, high = wilson(round(self.correct[number]), self.images)
                results[task.name] = {
                    "accuracy": accuracy,
                    "low": low,
                    "high": high,
                    "most_frequent": self.by_frequency[number] / self.images,
                    "alpha": self.probe.alphas[number],
                }
        return results


def _added(one: list[float], other: list[float]) -> list[float]:
    return [a + b for a, b in zip(one, other, strict=True)] if one and other else one or other
