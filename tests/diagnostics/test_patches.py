"""Cohesion, coupling, contrast and pairwise cosine as the papers' sums over pairs say, pair by pair."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from nemo_pre.diagnostics.patches import NOTHING, PatchSimilarity, patch_classes

CLASSES = ([0, 0, 0, 5, 5, 2, NOTHING, NOTHING], [1, 1, 1, 1], [0, 1, 2], [3, 3, 3, 4, NOTHING])


def images(shift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two images with contrast, one of one class, one whose classes have one token each."""
    image = torch.cat([torch.full((len(classes),), number) for number, classes in enumerate(CLASSES)])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(len(image), 5, generator=generator) + shift
    return tokens, image, torch.tensor([number for classes in CLASSES for number in classes])


def slowly(tokens: torch.Tensor, image: torch.Tensor, classes: torch.Tensor) -> dict[str, float]:
    """Equations 3 to 5 with loops over pairs."""

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    cosines = F.cosine_similarity(tokens[:, None].double(), tokens[None].double(), dim=-1)
    pairwise, cohesion, coupling = [], [], []
    for number in range(len(CLASSES)):
        rows = (image == number).nonzero().flatten().tolist()
        pairwise.append(mean(float(cosines[i, j]) for i, j in itertools.permutations(rows, 2)))
        members: dict[int, list[int]] = {}
        for row in rows:
            if classes[row] != NOTHING:
                members.setdefault(int(classes[row]), []).append(row)
        large = [patches for patches in members.values() if len(patches) > 1]
        if large and len(members) > 1:
            cohesion.append(mean(mean(float(cosines[i, j]) for i, j in itertools.combinations(p, 2)) for p in large))
            pairs = itertools.combinations(members.values(), 2)
            coupling.append(mean(mean(float(cosines[i, k]) for i in one for k in two) for one, two in pairs))
    return {
        "pairwise_cosine": mean(pairwise),
        "cohesion": mean(cohesion),
        "coupling": mean(coupling),
        "contrast": mean(cohesion) / mean(coupling),
        "contrast_difference": mean(cohesion) - mean(coupling),
    }


def test_streamed_similarities_are_the_sums_over_pairs():
    tokens, image, classes = images()
    whole, parts = PatchSimilarity(), [PatchSimilarity(), PatchSimilarity()]
    whole.update(tokens, image, classes)
    for number, part in enumerate(parts):
        inside = image % 2 == number
        part.update(tokens[inside], image[inside], classes[inside])
    expected = slowly(tokens, image, classes)
    assert whole.result() == pytest.approx(expected)
    assert parts[0].merge(parts[1]).result() == pytest.approx(expected)
    assert whole.images_with_contrast == 2


def test_a_ratio_to_no_coupling_is_none_and_the_difference_remains():
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    similarity = PatchSimilarity()
    similarity.update(tokens, torch.zeros(4, dtype=torch.int64), torch.tensor([0, 0, 1, 1]))
    assert similarity.result()["contrast"] is None
    assert similarity.result()["contrast_difference"] == pytest.approx(1.0)


def test_without_masks_or_with_one_token_there_is_nothing_to_compare():
    similarity = PatchSimilarity()
    similarity.update(torch.randn(1, 3), torch.zeros(1, dtype=torch.int64), None)
    assert set(similarity.result().values()) == {None}


def test_a_patch_belongs_to_the_object_that_covers_a_quarter_of_it():
    def patch(**pixels: int) -> list[int]:
        names = {"back": 0, "cat": 7, "dog": 9, "none": NOTHING}
        return [names[name] for name, count in pixels.items() for _ in range(count)]

    patches = {
        7: patch(back=12, cat=4),
        9: patch(cat=4, back=6, dog=6),
        0: patch(back=13, cat=3),
        NOTHING: patch(back=4, cat=0, none=12),
    }
    assert patch_classes(torch.tensor(list(patches.values())), background=0).tolist() == list(patches)
    # With a labelled half a quarter of that half is enough; without a background every class is an object.
    half = torch.tensor([patch(cat=2, back=6, none=8)])
    assert patch_classes(half, background=0).tolist() == [7]
    assert patch_classes(half, background=None).tolist() == [0]
    assert patch_classes(torch.full((1, 16), NOTHING), background=0).tolist() == [NOTHING]


def test_a_patch_that_is_mostly_padding_belongs_to_nothing():
    padded = torch.tensor([[7] * 7 + [NOTHING] * 9, [7] * 8 + [NOTHING] * 8])
    assert patch_classes(padded, background=None).tolist() == [NOTHING, 7]
