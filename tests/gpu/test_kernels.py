"""Losses and attention on the GPU against the CPU in float64."""

import copy

import pytest
import torch

from nemo_pre.losses import gram_anchoring_loss, masked_prediction_loss, predictive_loss
from nemo_pre.neva.mixed_attention import _attend_flex, attend_dense, attend_split
from nemo_pre.parallel.token_streams import IMAGE, ORDER, SEQUENCE
from nemo_pre.terms.float32 import Float32Linear

TOKENS, WIDTH = 1152, 512
IMAGES = torch.arange(TOKENS) // 288
LOSSES = {
    "PRe": lambda student, teacher: predictive_loss(student, teacher)[0],
    "MIM": lambda student, teacher: masked_prediction_loss(student, teacher, 0.1, 0.04)[0],
    "CGA": lambda student, teacher: gram_anchoring_loss(student, teacher, IMAGES)[0],
    "GA": lambda student, teacher: gram_anchoring_loss(student, teacher, IMAGES, clipped=False)[0],
}
TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 2e-2}


def value_and_gradient(loss, student, teacher):
    student = student.detach().requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach().double().cpu(), student.grad.double().cpu()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_value_and_gradient_of_float64_on_the_cpu(name, dtype, device):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(TOKENS, WIDTH, generator=generator).to(dtype) for _ in range(2))
    found = value_and_gradient(LOSSES[name], student.to(device), teacher.to(device))
    expected = value_and_gradient(LOSSES[name], student.double(), teacher.double())
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()


def test_a_bf16_head_computes_in_tf32_and_what_is_around_it_does_not(device):
    """On a CPU it is float32: 1.7e-3, the rounding of what leaves."""
    torch.manual_seed(0)
    head = torch.nn.Sequential(Float32Linear(WIDTH, 256), torch.nn.GELU(), Float32Linear(256, WIDTH)).bfloat16()
    student, teacher = (torch.randn(TOKENS, WIDTH).bfloat16() for _ in range(2))
    found, expected = [], []
    for where, dtype, gradients in ((device, torch.bfloat16, found), ("cpu", torch.float64, expected)):
        placed = copy.deepcopy(head).to(where, dtype)
        seen = student.to(where, dtype).requires_grad_()
        output = placed(seen)
        assert output.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        LOSSES["MIM"](output, teacher.to(where, dtype)).backward()
        gradients += [seen.grad.double().cpu(), *(parameter.grad.double().cpu() for parameter in placed.parameters())]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 6e-3 * other.norm()
    assert not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("attend", [_attend_flex, attend_split], ids=["block-sparse", "run-by-run"])
def test_a_kernel_attends_as_the_dense_mask_does(attend, heads, width, device):
    if device == "cpu" and attend is _attend_flex:
        pytest.skip("FlexAttention has no backward pass on a CPU")
    length = 512
    structure = torch.zeros(1, length, 3, dtype=torch.int32)
    structure[0, :, ORDER] = torch.arange(length)
    structure[0, 300:, SEQUENCE] = -1  # a second sample of the row
    structure[0, :, IMAGE] = -1
    structure[0, 40:184, IMAGE], structure[0, 320:464, IMAGE] = 0, 1
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, n, length, width, generator=generator) for n in (heads[0], heads[1], heads[1])]
    upstream = torch.randn(1, heads[0], length, width, generator=generator)

    def outputs(attend, dtype, where):
        tensors = [tensor.to(where, dtype).requires_grad_() for tensor in inputs]
        output = attend(*tensors, structure.to(where), 0, width**-0.5)
        output.backward(upstream.to(where, dtype))
        return [tensor.double().cpu() for tensor in (output.detach(), *(tensor.grad for tensor in tensors))]

    found = outputs(attend, torch.bfloat16, device)
    expected = outputs(attend_dense, torch.float64, "cpu")
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()
