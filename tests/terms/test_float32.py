"""Heads compute in float32 of bf16 weights and tokens: their gradients against float64's, and what backward keeps."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nemo_pre.losses import masked_prediction_loss, predictive_loss
from nemo_pre.objectives.viral.head import AlignmentHead
from nemo_pre.terms.float32 import Float32LayerNorm, Float32Linear

WIDTH, TOKENS = 1024, 48


def head(layer: Callable[..., nn.Module], *widths: int) -> nn.Sequential:
    """Linear layers with GELUs between, of Kaiming-normal weights, as LaVer's head has them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [layer(inputs, outputs), nn.GELU()]
        nn.init.kaiming_normal_(layers[-2].weight)
    return nn.Sequential(*layers[:-1])


def tokens(seed: int) -> Tensor:
    """Of length sqrt(WIDTH), alike among themselves as an image's are."""
    numbers = torch.Generator().manual_seed(seed)
    drawn = torch.randn(1, WIDTH, generator=numbers) + torch.randn(TOKENS, WIDTH, generator=numbers)
    return nn.functional.rms_norm(drawn, (WIDTH,)).bfloat16()


def mim(student: nn.Module, teacher: nn.Module, seen: Tensor) -> Tensor:
    taught = (tokens(1) + tokens(2) / 4).to(seen.dtype)  # rounded once, whoever computes
    return masked_prediction_loss(student(seen), teacher(taught), 0.1, 0.04)[0]


def cosine(student: nn.Module, _: nn.Module, seen: Tensor) -> Tensor:
    return predictive_loss(student(seen), tokens(3).to(seen.dtype))[0]


def gradient(loss: Callable[..., Tensor], student: nn.Module, teacher: nn.Module, seen: Tensor) -> list[Tensor]:
    seen = seen.clone().requires_grad_()
    return list(torch.autograd.grad(loss(student, teacher, seen), [seen, *student.parameters()]))


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The worst tensor's, relative to its norm."""
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("loss", "widths", "in_bf16"),
    [(mim, (WIDTH, 512, 512, WIDTH), 2e-2), (cosine, (WIDTH, WIDTH // 4, WIDTH), 3e-3)],
    ids=["L_MIM", "cosine"],
)
def test_gradients_of_a_bf16_head_are_those_of_float64_but_for_their_own_rounding(loss, widths, in_bf16):
    """Rounding to bf16 once is off by 1.7e-3. Layers that compute in bf16 are off by more than ``in_bf16``."""
    ours, plain = (head(layer, *widths).bfloat16() for layer in (Float32Linear, nn.Linear))
    exact, seen = copy.deepcopy(plain).double(), tokens(1)
    expected, found = gradient(loss, exact, exact, seen.double()), gradient(loss, ours, ours, seen)
    assert [gradient.dtype for gradient in found] == [torch.bfloat16] * len(found)
    assert error(found, expected) < 2.5e-3
    assert error(gradient(loss, plain, plain, seen), expected) > in_bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_float32_head_computes_what_it_always_did_bit_for_bit(dtype):
    ours, plain = (head(layer, WIDTH, 64, WIDTH).to(dtype) for layer in (Float32Linear, nn.Linear))
    seen = tokens(1).to(dtype)
    for one, other in zip(gradient(cosine, ours, ours, seen), gradient(cosine, plain, plain, seen), strict=True):
        assert torch.equal(one, other)


def test_a_norm_computes_in_float32_of_bf16_weights():
    norm = Float32LayerNorm(WIDTH).bfloat16()
    nn.init.normal_(norm.weight)
    exact = copy.deepcopy(norm).double()
    found = norm(tokens(1))
    assert found.dtype == torch.float32
    right = nn.functional.layer_norm(tokens(1).double(), (WIDTH,), exact.weight, exact.bias, norm.eps)
    assert torch.allclose(found.double(), right, atol=1e-5)


def test_backward_keeps_the_tokens_as_they_came_and_no_wide_copy_of_the_weights():
    layer = Float32Linear(WIDTH, 64).bfloat16()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(tokens(1).requires_grad_())
    assert {tensor.dtype for tensor in kept} == {torch.bfloat16} and len(kept) == 2


def test_a_head_without_tokens_gives_its_parameters_zeros():
    made = AlignmentHead((WIDTH, 32, 16)).bfloat16()
    made(tokens(1)[:0]).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 and not p.grad.any() for p in made.parameters())
