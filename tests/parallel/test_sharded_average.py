"""A sharded moving average is the moving average, however many ranks hold it."""

from __future__ import annotations

import pytest
import torch

from tests.parallel.branch_ranks import average_over_steps
from tests.ranks import run_on_standing_ranks

SHAPES = [(3, 5), (7,), (1,), (2, 2, 2), (11,)]  # no multiple of the ranks, and parameters that are cut


def tensors(seed: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_twenty_steps_equal_an_unsharded_average(ranks, dtype):
    steps = [tensors(1 + step, dtype) for step in range(20)]
    expected = [tensor.double() for tensor in tensors(0, dtype)]
    for step in steps:
        expected = [0.99 * mean + 0.01 * tensor.double() for mean, tensor in zip(expected, step, strict=True)]
    for found in run_on_standing_ranks(average_over_steps, ranks, tensors(0, dtype), steps, 0.99):
        for mean, right in zip(found, expected, strict=True):
            assert mean.dtype == torch.float32 and mean.shape == right.shape
            torch.testing.assert_close(mean.double(), right, rtol=0, atol=2e-6)


def test_momentum_zero_follows_and_momentum_one_stands_still():
    start, step = tensors(0, torch.float32), tensors(1, torch.float32)
    (follows,) = run_on_standing_ranks(average_over_steps, 1, start, [step], 0.0)
    (stands,) = run_on_standing_ranks(average_over_steps, 1, start, [step], 1.0)
    assert all(map(torch.equal, follows, step)) and all(map(torch.equal, stands, start))


def test_bf16_students_move_a_float32_average_by_less_than_bf16_can_say():
    """An update of 0.001 of a difference of 0.01 vanishes in bf16 at magnitude 1, which has steps of 0.0078."""
    start, step = [torch.ones(4, dtype=torch.bfloat16)], [torch.full((4,), 1.0078125, dtype=torch.bfloat16)]
    (found,) = run_on_standing_ranks(average_over_steps, 1, start, [step], 0.999)
    torch.testing.assert_close(found[0], torch.full((4,), 1 + 0.0078125e-3), rtol=0, atol=1e-7)
