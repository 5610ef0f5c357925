"""Gradients that are added or scaled on the way back, with values untouched."""

from __future__ import annotations

import torch

from nemo_pre.parallel.auxiliary_gradient import scale_gradient


def test_a_scaled_gradient_leaves_the_value_alone():
    x = torch.tensor([1.0, -2.0], requires_grad=True)
    y = scale_gradient(x * 3, 0.25)
    assert torch.equal(y, x.detach() * 3)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.75, 0.75]


def test_a_factor_of_one_is_the_tensor_itself_and_zero_stops_the_gradient_but_not_the_graph():
    x = torch.tensor([1.0], requires_grad=True)
    assert scale_gradient(x, 1.0) is x
    scale_gradient(x, 0.0).sum().backward()
    assert x.grad is not None and x.grad.item() == 0
