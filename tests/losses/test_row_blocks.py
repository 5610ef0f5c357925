"""The losses work block by block, keep one tensor, and give what the plain expression gives."""

import pytest
import torch
import torch.nn.functional as F

from nemo_pre.losses import masked_prediction_loss, predictive_loss, row_blocks


def plain_predictive(prediction, anchor):
    return -F.cosine_similarity(prediction.float(), anchor.float(), dim=-1).sum()


def plain_masked_prediction(student, teacher):
    return -((teacher.float() / 0.04).softmax(dim=-1) * (student.float() / 0.1).log_softmax(dim=-1)).sum()


LOSSES = [
    (lambda student, other: predictive_loss(student, other)[0], plain_predictive),
    (lambda student, other: masked_prediction_loss(student, other, 0.1, 0.04)[0], plain_masked_prediction),
]


@pytest.mark.parametrize(("rows", "columns", "blocks"), [(7, 3, 4), (7, 100, 7), (6, 4, 3), (0, 4, 0), (3, 0, 1)])
def test_blocks_are_all_rows_in_order_and_never_empty(rows, columns, blocks, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 8)
    matrix = torch.arange(rows)[:, None].expand(rows, columns)
    found = list(row_blocks.row_blocks(matrix))
    assert len(found) == blocks and all(len(matrix[block]) for block in found)
    assert [row for block in found for row in range(rows)[block]] == list(range(rows))


@pytest.mark.parametrize(("loss", "plain"), LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_blocks_give_the_plain_expressions_value_and_gradient(loss, plain, dtype, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_ELEMENTS", 64)
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(23, 16, generator=generator).to(dtype)
    found, expected = (torch.randn(23, 16, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    found.requires_grad_()
    expected.requires_grad_()
    (0.7 * loss(found, other)).backward()
    (0.7 * plain(expected, other)).backward()
    torch.testing.assert_close(loss(found, other), plain(expected, other), rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7  # two roundings to bfloat16 instead of one
    torch.testing.assert_close(found.grad, expected.grad, rtol=tolerance, atol=tolerance * 0.1)


@pytest.mark.parametrize(("loss", "plain"), LOSSES)
def test_backward_needs_one_tensor_like_the_student_and_validation_none(loss, plain):
    other = torch.randn(64, 32, dtype=torch.bfloat16)

    def kept(function, student):
        tensors = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.setdefault(t.data_ptr(), t), lambda t: t):
            function(student, other)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    student = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    assert kept(loss, student) == 64 * 32 * 2
    assert kept(plain, student) >= 2 * 64 * 32 * 4
    assert kept(loss, student.detach()) == 0


def test_a_vector_without_length_is_pulled_towards_its_anchor_with_a_bounded_gradient():
    anchor = torch.tensor([[3.0, 4.0]] * 2, dtype=torch.float64)
    prediction = torch.tensor([[0.0, 0.0], [1e-9, 0.0]], dtype=torch.float64, requires_grad=True)
    predictive_loss(prediction, anchor)[0].backward()
    # Below 1e-8 the loss is -(p . a^) / 1e-8, whose gradient is the same everywhere.
    torch.testing.assert_close(prediction.grad, torch.tensor([[-0.6e8, -0.8e8]] * 2, dtype=torch.float64))
