"""Rotary angles of visual tokens: text is turned as without images, bit for bit."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.config.derived import axis_of_frequency
from nemo_pre.config.schema import RopeScalingConfig
from nemo_pre.neva.rotary import VisualRotaryEmbedding, inverse_frequency


def megatron_angles(length: int, head_dim: int, base: float) -> torch.Tensor:
    """What Megatron's RotaryEmbedding gives, ``[S, 1, 1, head_dim]``."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    return RotaryEmbedding(head_dim, 1.0, rotary_base=base, use_cpu_initialization=True, cp_group=None)(length)


@pytest.mark.parametrize("kind, sections", [("1d", None), ("2d", None), ("2d", [4, 12]), ("mrope", None)])
@pytest.mark.parametrize("base", [1e4, 1e6])
def test_text_has_megatrons_angles_bit_for_bit_under_every_split(kind, sections, base, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cpu")
    frequency = inverse_frequency(32, base, RopeScalingConfig())
    embedding = VisualRotaryEmbedding(frequency, axis_of_frequency(kind, sections, 16))
    positions = torch.arange(3000).expand(3, 2, 3000)
    found = embedding(positions)
    assert found.shape == (3000, 2, 1, 32)
    assert torch.equal(found, megatron_angles(3000, 32, base).expand(3000, 2, 1, 32))


def test_each_axis_turns_its_own_frequencies():
    frequencies = inverse_frequency(8, 100.0, RopeScalingConfig())
    embedding = VisualRotaryEmbedding(frequencies, axis_of_frequency("2d", None, 4))
    angles = embedding(torch.tensor([[[9]], [[2]], [[5]]]))[0, 0, 0]
    frequency = [100.0 ** (-2 * k / 8) for k in range(4)]
    expected = [2 * frequency[0], 5 * frequency[1], 2 * frequency[2], 5 * frequency[3]]
    torch.testing.assert_close(angles, torch.tensor(expected * 2))


def test_the_released_codes_sections():
    axes = axis_of_frequency("mrope", None, 64)
    assert (axes.count(0), axes.count(1), axes.count(2)) == (16, 24, 24)
    assert axes == axis_of_frequency("mrope", [16, 24, 24], 64) == sorted(axes)


@pytest.mark.parametrize("kind, sections", [("2d", [8, 7]), ("2d", [16]), ("mrope", [8, 8])])
def test_sections_that_do_not_fit_are_refused(kind, sections):
    with pytest.raises(ValueError, match="add up to 16, half a head's width"):
        axis_of_frequency(kind, sections, 16)
