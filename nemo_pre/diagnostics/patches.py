"""What a patch shows, and how alike the patches of an image are.

The rule from mask to patch: a patch of which less than half is labelled (padding is not) belongs to nothing. Otherwise
it belongs to the object that covers most of it, if that is at least ``OBJECT_SHARE`` of its labelled pixels; else to
the background, if the data have one and it covers more than any object; else to nothing. The mask is cut and resized
as the picture is, without interpolation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_pre.losses.pairwise_cosine import pair_cosines

NOTHING = -1  # the class of a patch that belongs to none
OBJECT_SHARE = 0.25
NO_COUPLING = 1e-6  # a ratio to less than this is noise


def patch_classes(pixels_PK: Tensor, background: int | None) -> Tensor:
    """The class ``[P]`` of each patch from the classes ``[P, K]`` of its pixels, by the rule above.

    Args:
        pixels_PK: int64, ``NOTHING`` where a pixel has no label.
        background: the class that counts only where no object is; None where every class is an object.
    """
    labelled = (pixels_PK != NOTHING).sum(1)
    known = 2 * labelled >= pixels_PK.shape[1]
    best = torch.full((len(pixels_PK),), NOTHING)
    most = torch.zeros(len(pixels_PK), dtype=torch.int64)
    for number in pixels_PK.unique().tolist():
        if number not in (NOTHING, background):
            size = (pixels_PK == number).sum(1)
            best = torch.where(size > most, number, best)
            most = torch.maximum(size, most)
    is_object = known & (most >= OBJECT_SHARE * labelled)
    rest = torch.full_like(best, NOTHING)
    if background is not None:
        behind = (pixels_PK == background).sum(1)
        rest = torch.where(known & (behind > most), background, rest)
    return torch.where(is_object, best, rest)


@dataclass
class PatchSimilarity:
    """Means over images of cosines between the visual tokens of an image.

    - pairwise cosine: of two different tokens (LaVer, arXiv 2512.06281: homogenisation);
    - cohesion: of two different tokens of one class, averaged over its pairs, then over the classes of the image that
      have two tokens (PRe, arXiv 2603.20808, eq. 3);
    - coupling: of two tokens of different classes, averaged over the pairs of two classes, then over the pairs of
      classes (eq. 4);
    - contrast: cohesion / coupling (eq. 5), of the two means; and cohesion - coupling, which is stable where coupling
      is near 0. The ratio is None where coupling is at most ``NO_COUPLING``.

    Cohesion and coupling are over the same images: those with two classes, one of them with two tokens.
    """

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def update(self, tokens: Tensor, image: Tensor, classes: Tensor | None) -> None:
        """Add the tokens ``[n, D]`` of whole images.

        Args:
            image: ``[n]``, which image each is of.
            classes: ``[n]`` int64 on the CPU, ``NOTHING`` for a token without one; None without masks.
        """
        units = F.normalize(tokens.double(), dim=-1)
        for number in image.unique().tolist():
            inside = image == number
            self._add_image(units[inside], None if classes is None else classes[inside.to(classes.device)])

    def _add_image(self, units: Tensor, classes: Tensor | None) -> None:
        size = len(units)
        if size > 1:
            cosines, pairs = pair_cosines(units.sum(0), size)
            self._add("pairwise_cosine", float(cosines) / pairs)
        if classes is None:
            return
        present = [number for number in classes.unique().tolist() if number != NOTHING]
        members = torch.stack([classes == number for number in present]) if present else classes.new_zeros(0, size)
        sizes = members.sum(1).to(units)
        totals = members.to(units) @ units  # [classes, D]: cosines of all pairs add up to products of these
        several = sizes > 1
        if len(present) < 2 or not several.any():
            return
        of_class, pairs_of_class = pair_cosines(totals[several], sizes[several])
        within = of_class / pairs_of_class
        between = totals @ totals.T / torch.outer(sizes, sizes)
        self._add("cohesion", float(within.mean()))
        self._add("coupling", float((between.sum() - between.trace()) / (len(present) * (len(present) - 1))))

    def _add(self, name: str, value: float) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + 1

    def merge(self, other: PatchSimilarity) -> PatchSimilarity:
        names = {*self.sums, *other.sums}
        return PatchSimilarity(
            {name: self.sums.get(name, 0.0) + other.sums.get(name, 0.0) for name in names},
            {name: self.counts.get(name, 0) + other.counts.get(name, 0) for name in names},
        )

    def result(self) -> dict[str, float | None]:
        means: dict[str, float | None] = dict.fromkeys(
            ("pairwise_cosine", "cohesion", "coupling", "contrast", "contrast_difference")
        )
        means |= {name: total / self.counts[name] for name, total in self.sums.items()}
        cohesion, coupling = means["cohesion"], means["coupling"]
        if cohesion is not None and coupling is not None:
            means["contrast"] = cohesion / coupling if coupling > NO_COUPLING else None
            means["contrast_difference"] = cohesion - coupling
        return means

    @property
    def images_with_contrast(self) -> int:
        return self.counts.get("cohesion", 0)
