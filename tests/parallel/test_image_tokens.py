"""The relational term of whole samples is the same however their images are cut over ranks: value, count, gradient."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.parallel.sequence_layout import sequence_layout
from tests.parallel.branch_ranks import relational_terms
from tests.ranks import run_ranks

IMAGE_TOKEN = -200
TOKENS = torch.tensor([[5, IMAGE_TOKEN, 6, IMAGE_TOKEN, 7], [8, 9, 10, 11, 12], [IMAGE_TOKEN, 8, 9, 10, 11]])
TILES = [[(2, 2)], [(2, 2), (2, 2)], [(1, 3)]]  # the second image has two tiles, and is cut at its end
LENGTH = 12


def cosine(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a * b).sum() / (a.norm() * b.norm())


def slow(image_BS: torch.Tensor, student_BSd: torch.Tensor, teacher_BSt: torch.Tensor) -> tuple[torch.Tensor, int]:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for image in image_BS[image_BS >= 0].unique().tolist():
        places = (image_BS == image).nonzero().tolist()
        for row, i in places:
            for _, j in places:
                wanted = cosine(teacher_BSt[row, i], teacher_BSt[row, j])
                total = total + (cosine(student_BSd[row, i], student_BSd[row, j]) - wanted) ** 2
                count += 1
    return total, count


@pytest.mark.parametrize("cut", [(1, 1), (2, 1), (1, 2), (2, 2)], ids=["whole", "SP2", "CP2", "SP2-CP2"])
def test_the_relational_term_and_its_gradient_do_not_depend_on_how_samples_are_cut(cut):
    tp, cp = cut
    layout = sequence_layout(TOKENS, TILES, IMAGE_TOKEN, LENGTH)
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(3, LENGTH, 5, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, LENGTH, 4, generator=generator, dtype=torch.float64)
    expected, count = slow(layout.visual_image_BS, student, teacher)
    assert count == 4**2 + 6**2 + 3**2
    expected.backward()
    assert student.grad is not None
    found = run_ranks(relational_terms, tp * cp, layout, student.detach(), teacher, tp, cp)
    assert sum(number for _, number, _, _ in found) == count
    assert sum(value for value, _, _, _ in found) == pytest.approx(expected.item(), rel=1e-10)
    for _, _, gradient, here in found:
        torch.testing.assert_close(gradient, student.grad[:, here], rtol=1e-9, atol=1e-12)
