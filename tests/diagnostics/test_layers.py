"""All measures of a layer add up over batches of pictures."""

from __future__ import annotations

import pytest
import torch

from nemo_pre.diagnostics.layers import LayerMeasures
from nemo_pre.diagnostics.moments import Moments
from nemo_pre.diagnostics.probe import ProbeFit, ProbeScore, ProbeTask
from nemo_pre.diagnostics.states import Grid, VisualStates, asking_tokens, attention_mass
from tests.diagnostics.diagnose_ranks import numbers

PICTURES, TOKENS = 10, 6


def states(first: int, last: int) -> tuple[VisualStates, torch.Tensor]:
    """The pictures from ``first`` up to ``last`` of always the same ones."""
    generator = torch.Generator().manual_seed(0)
    entering, layer = torch.randn(2, PICTURES, TOKENS, 5, generator=generator).flatten(2).unflatten(2, (TOKENS, 5))
    classes = torch.randint(-1, 3, (PICTURES, TOKENS), generator=generator)
    attention = torch.rand(PICTURES, 4, generator=generator)
    attention[3] = float("nan")  # no text behind this picture
    truth = torch.nn.functional.one_hot(torch.randint(0, 2, (PICTURES,), generator=generator), 2).float()
    chosen = slice(first, last)
    image = torch.arange(last - first).repeat_interleave(TOKENS)
    found = VisualStates(
        image, [Grid(0, 2, 3)] * (last - first), classes[chosen].flatten(), entering[chosen].flatten(0, 1)
    )
    found.layers[1] = layer[chosen].flatten(0, 1) + 2
    found.attention[1] = attention[chosen]
    return found, truth[chosen]


def measured(*cuts: int) -> list[LayerMeasures]:
    fit = ProbeFit([ProbeTask("count", 2)])
    everything, truth = states(0, PICTURES)
    fit.update(everything.pooled(1), truth, torch.arange(PICTURES))
    parts = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        part = LayerMeasures(ProbeScore(fit.solve()))
        part.update(1, *states(first, last))
        parts.append(part)
    return parts


def entering(first: int = 0, last: int = PICTURES) -> Moments:
    return Moments.of(states(first, last)[0].entering)


def test_batches_give_the_result_of_all_pictures_at_once():
    (whole,) = measured(0, PICTURES)
    batches = measured(0, 1)[0]
    batches.update(1, *states(1, 4))
    batches.update(1, *states(4, PICTURES))
    assert numbers(batches.result(entering())) == pytest.approx(numbers(whole.result(entering())))


def test_a_picture_without_text_behind_it_says_nothing_of_attention():
    (whole,) = measured(0, PICTURES)
    attention = states(0, PICTURES)[0].attention[1].double()
    expected = attention[[n for n in range(PICTURES) if n != 3]].mean(0)
    assert whole.result(entering())["attention_to_visual_by_head"] == pytest.approx(expected.tolist())
    assert whole.asked == PICTURES - 1


def test_only_text_behind_the_last_visual_token_asks_and_padding_does_not():
    is_visual = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0]], dtype=torch.bool)
    is_text = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 1, 0, 1, 0, 1]], dtype=torch.bool)
    asking = asking_tokens(is_visual, is_text)
    assert asking.int().tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1]]
    weights = torch.rand(2, 3, 6, 6).softmax(3)
    mass = attention_mass(weights, is_visual, asking)
    expected = sum(weights[0, 2, query, [1, 2]].sum() for query in (3, 4)) / 2
    assert mass[0, 2] == pytest.approx(float(expected), rel=1e-5)
    assert mass[1, 0] == pytest.approx(float(weights[1, 0, 5, [2, 4]].sum()), rel=1e-5)
    assert attention_mass(weights, is_visual, torch.zeros_like(asking)).isnan().all()
