import pytest
import torch

from nemo_pre.losses import gram_anchoring_loss

UNEVEN = torch.tensor([4, 1, 4, 4, 9, 1, 4])  # ids in any order, an image of one token among them


def tokens(n=7, k=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(2)]


def cosine(a, b):
    return (a * b).sum() / (a.norm() * b.norm())


def slow(student, teacher, image_ids, clipped):
    total, entries = torch.zeros((), dtype=torch.float64), 0
    for i in range(len(student)):
        for j in range(len(student)):
            if image_ids[i] == image_ids[j]:
                difference = cosine(student[i], student[j]) - cosine(teacher[i], teacher[j])
                total = total + (difference.clamp(min=0) if clipped else difference) ** 2
                entries += 1
    return total, entries


def test_two_tokens_by_hand():
    # The student's tokens are at 45 degrees, the teacher's at right angles: two entries of 1/2 off the diagonal.
    student = torch.tensor([[1.0, 0.0], [3.0, 3.0]])
    teacher = torch.tensor([[5.0, 0.0], [0.0, 1.0]])
    loss, count = gram_anchoring_loss(student, teacher, torch.zeros(2, dtype=torch.int64))
    assert count == 4
    assert loss.item() == pytest.approx(2 * 0.5)
    assert gram_anchoring_loss(teacher, student, torch.zeros(2, dtype=torch.int64))[0].item() == 0, "clipped"
    swapped = gram_anchoring_loss(teacher, student, torch.zeros(2, dtype=torch.int64), clipped=False)[0]
    assert swapped.item() == pytest.approx(1.0)


@pytest.mark.parametrize("clipped", [True, False])
@pytest.mark.parametrize("image_ids", [UNEVEN, torch.zeros(7, dtype=torch.int64), torch.arange(7)])
def test_value_count_and_gradient_equal_plain_loops_in_float64(clipped, image_ids):
    student, teacher = tokens()
    student.requires_grad_()
    loss, count = gram_anchoring_loss(student, teacher, image_ids, clipped)
    expected, entries = slow(student, teacher, image_ids, clipped)
    assert count == entries and loss.dtype == torch.float64
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    (gradient,), (right,) = torch.autograd.grad(loss, student), torch.autograd.grad(expected, student)
    torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("clipped", [True, False])
def test_gradient_equals_finite_differences(clipped):
    student, teacher = tokens(seed=3)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: gram_anchoring_loss(z, teacher, UNEVEN, clipped)[0], student)


@pytest.mark.parametrize("clipped", [True, False])
def test_a_teacher_of_another_width_is_compared_by_its_angles(clipped):
    student, _ = tokens(k=3)
    _, teacher = tokens(k=8, seed=4)
    student.requires_grad_()
    loss, count = gram_anchoring_loss(student, teacher, UNEVEN, clipped)
    expected, entries = slow(student, teacher, UNEVEN, clipped)
    assert count == entries
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: gram_anchoring_loss(z, teacher, UNEVEN, clipped)[0], student)
    wider = torch.cat([teacher, torch.zeros(7, 5)], dim=1)
    torch.testing.assert_close(gram_anchoring_loss(student, wider, UNEVEN, clipped)[0], loss)


def test_a_student_nowhere_more_alike_than_its_teacher_pays_nothing_clipped_and_something_unclipped():
    generator = torch.Generator().manual_seed(1)
    student = torch.eye(6) + 0.02 * torch.randn(6, 6, generator=generator)  # nearly at right angles
    teacher = torch.ones(6, 6) + 0.5 * torch.eye(6)  # nearly the same
    ids = torch.zeros(6, dtype=torch.int64)
    assert gram_anchoring_loss(student, teacher, ids)[0].item() < 1e-12  # the diagonal's rounding
    assert gram_anchoring_loss(student, teacher, ids, clipped=False)[0].item() > 10


def test_clipped_plus_clipped_with_the_roles_swapped_is_the_symmetric_term():
    student, teacher = tokens()
    both = sum(gram_anchoring_loss(a, b, UNEVEN)[0] for a, b in ((student, teacher), (teacher, student)))
    torch.testing.assert_close(both, gram_anchoring_loss(student, teacher, UNEVEN, clipped=False)[0])


def test_only_the_student_gets_a_gradient_and_lengths_do_not_matter():
    student, teacher = (z.requires_grad_() for z in tokens())
    loss = gram_anchoring_loss(student, teacher, UNEVEN)[0]
    loss.backward()
    assert student.grad is not None and student.grad.any() and teacher.grad is None
    lengths = torch.linspace(0.1, 9, 7, dtype=torch.float64)[:, None]
    torch.testing.assert_close(gram_anchoring_loss(student * lengths, teacher / lengths, UNEVEN)[0], loss)


def test_no_token_gives_zero_that_is_still_connected():
    student = torch.zeros(0, 5, requires_grad=True)
    loss, count = gram_anchoring_loss(student, torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert loss.item() == 0 and count == 0
    loss.backward()
    assert student.grad is not None


def test_bf16_is_compared_in_float32():
    student, teacher = (z.bfloat16() for z in tokens(n=40, k=16))
    ids = torch.arange(40) // 8
    loss, _ = gram_anchoring_loss(student, teacher, ids)
    assert loss.dtype == torch.float32
    expected, _ = slow(student.double(), teacher.double(), ids, True)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def bytes_kept(images: int) -> int:
    """What autograd keeps for the backward pass, each storage once."""
    student, teacher = tokens(n=64 * images, k=8)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gram_anchoring_loss(student.requires_grad_(), teacher, torch.arange(64 * images) // 64)
    return sum(kept.values())


def test_memory_grows_with_the_images_and_no_gram_matrix_is_kept():
    two, eight = bytes_kept(2), bytes_kept(8)
    assert eight <= 4.2 * two
    assert eight < 8 * 64 * 64 * 8, "less than eight Gram matrices"


def test_wrong_shapes_are_refused():
    z = torch.zeros(3, 4)
    for arguments in (
        (z, torch.zeros(2, 4), torch.zeros(3)),
        (z, z, torch.zeros(2)),
        (z, z[..., None], torch.zeros(3)),
        (z[0], z[0], torch.zeros(4)),
    ):
        with pytest.raises(ValueError, match=r"shapes \[n, k\] and \[n, j\], and image_ids \[n\]"):
            gram_anchoring_loss(*arguments)
