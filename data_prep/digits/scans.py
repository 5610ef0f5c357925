"""The source images: 1,797 scans of handwritten digits, split so that no scan is in both train and val."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from nemo_pre.whole_numbers import part_nearest

VAL_SCANS = 0.1  # fraction of each digit's scans that only validation scenes are made of


@dataclass(frozen=True)
class Scans:
    """``images`` uint8 [n, 8, 8] with ink 0..255, ``digits`` int64 [n], and each split's scan numbers by digit."""

    images: np.ndarray
    digits: np.ndarray
    by_split: dict[str, list[np.ndarray]]

    def draw(self, rng: np.random.Generator, split: str, digit: int) -> int:
        return int(rng.choice(self.by_split[split][digit]))

    def checksum(self) -> str:
        return hashlib.sha256(self.images.tobytes() + self.digits.tobytes()).hexdigest()


def load_scans(seed: int) -> Scans:
    """Reads the scans that ship with scikit-learn and splits each digit's by a shuffle seeded with ``seed``."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    digits = bunch.target.astype(np.int64)
    by_split: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    for digit in range(10):
        numbers = np.flatnonzero(digits == digit)
        numbers = np.random.default_rng([seed, digit]).permutation(numbers)
        num_val = part_nearest(VAL_SCANS, len(numbers))
        by_split["val"].append(np.sort(numbers[:num_val]))
        by_split["train"].append(np.sort(numbers[num_val:]))
    return Scans(images, digits, by_split)
