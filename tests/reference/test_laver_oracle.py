"""The LaVer oracle against cases worked by hand and against other formulations of the same thing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.reference import tiny
from tests.reference.neva_laver import (
    LaVerReferenceConfig,
    Token,
    alone,
    angles,
    gram,
    lay_places,
    masked_prediction,
    reference_laver_step,
    sees,
)
from tests.reference.neva_pre import reference_step, rotate


def config(**changes: Any) -> LaVerReferenceConfig:
    return LaVerReferenceConfig(**{**vars(tiny.tiny_config(pre_layers=(2,))), **changes})


def step(
    settings: LaVerReferenceConfig, ratio: float = 0.5, images: tuple[tuple[int, ...], ...] = ((2, 0), (1, 1))
) -> dict[str, Any]:
    state = tiny.random_state(settings)
    teacher = tiny.random_teacher(settings, seed=5) if settings.laver else {}
    batches = [tiny.random_batch(counts, seed=m) for m, counts in enumerate(images)]
    return reference_laver_step(state, teacher, settings, batches, masks(batches, ratio))


def masks(batches: list[dict[str, Any]], ratio: float) -> list[list[list[bool]]]:
    generator = torch.Generator().manual_seed(9)
    return [
        (torch.rand(len(batch["num_media_tiles"]), tiny.TOKENS_PER_IMAGE, generator=generator) < ratio).tolist()
        for batch in batches
    ]


def test_without_laver_and_causal_it_is_the_other_oracle():
    settings = config(laver=False, attention="causal", rope="1d")
    batches = [tiny.random_batch(counts, seed=m) for m, counts in enumerate([(2, 0), (1, 1)])]
    state = tiny.random_state(settings)
    found = reference_laver_step(state, {}, settings, batches, masks(batches, 0))
    expected = reference_step(state, tiny.tiny_config(pre_layers=(2,)), batches)
    assert found["loss_lm"] == pytest.approx(expected["loss_lm"].item(), rel=1e-12)
    assert found["loss_pre"] == pytest.approx(expected["loss_pre"].item(), rel=1e-12)
    for name, gradient in expected["grads"].items():
        torch.testing.assert_close(found["grads"][name], gradient, rtol=1e-9, atol=1e-13)


def test_the_figures_positions():
    source = [("text", 1), ("text", 2), *[("image", n) for n in range(12)], ("text", 3)]
    places = [token.place[1:] for token in lay_places(source, (4, 3), "2d")]
    assert places == [(0, 0), (1, 1), *[(2 + i, 2 + j) for i in range(4) for j in range(3)], (6, 6)]
    assert [token.place for token in alone(lay_places(source, (4, 3), "2d"), 0, (4, 3), "2d")][:4] == [
        (0, 0, 0),
        (0, 0, 1),
        (0, 0, 2),
        (0, 1, 0),
    ]


@pytest.mark.parametrize("rope", ["1d", "2d", "mrope"])
def test_text_is_turned_as_with_one_axis(rope):
    places = [(p, p, p) for p in range(9)]
    angle = angles(places, config(rope=rope), 8, torch.float64)
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = x.chunk(2, -1)
    turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
    torch.testing.assert_close(turned, rotate(x[:, None], 10000.0)[:, 0], rtol=1e-12, atol=1e-12)


def test_who_sees_whom():
    text, first, second = Token(None, None, 1, (0, 0, 0)), Token(0, 0, None, (0, 0, 0)), Token(1, 4, None, (0, 0, 0))
    row = [text, first, first, text, second, second]
    mixed = [[sees(q, k, row, True) for k in range(6)] for q in range(6)]
    assert mixed[1] == [True, True, True, False, False, False]  # its own image, ahead too
    assert mixed[3] == [True, True, True, True, False, False]
    assert mixed[4] == [True] * 6  # earlier tokens, and its own image
    assert not sees(1, 2, row, False)


def test_terms_equal_other_formulations():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    cross = F.cross_entropy(student[0] / 0.1, (teacher[0] / 0.04).softmax(-1))
    torch.testing.assert_close(masked_prediction(student[0], teacher[0], None, config()), cross)
    similarity = [F.cosine_similarity(z[:, None], z[None], dim=-1) for z in (student, teacher)]
    torch.testing.assert_close(gram(student, teacher, True), F.relu(similarity[0] - similarity[1]).square().sum())
    torch.testing.assert_close(gram(student, teacher, False), F.mse_loss(*similarity, reduction="sum"))


def test_nothing_masked_trains_no_mask_token_and_a_teacher_that_is_the_student_leaves_no_gram_term():
    settings = config(gram_clipped=False)
    state = tiny.random_state(settings)
    teacher = {n: w for n, w in state.items() if n.startswith(("language_model.decoder.", "laver_head."))}
    batches = [tiny.random_batch((1, 1), seed=0)]
    found = reference_laver_step(state, teacher, settings, batches, masks(batches, 0))
    assert (found["loss_mim"], found["masked"]) == (0, 0)
    assert found["loss_gram"] < 1e-24
    assert not found["grads"]["laver_mask_token"].any()
    half = reference_laver_step(state, teacher, settings, batches, masks(batches, 0.5))
    assert half["loss_mim"] > 0 and half["loss_gram"] > 1e-4 and half["grads"]["laver_mask_token"].any()


def test_counts_of_an_uneven_batch():
    found = step(config(), ratio=1.0)
    assert (found["visual"], found["masked"], found["gram_entries"]) == (16, 16, 4 * 16)
    assert step(config(gram_scope="micro_batch"))["gram_entries"] == 8**2 + 8**2
    assert found["similarity"] == pytest.approx(1), "the mask token everywhere: attention cannot tell places apart"
    assert 0 < found["teacher_entropy"] < math.log(tiny.WIDTH) and -1 < step(config())["similarity"] < 0.99


def test_variants_differ():
    plain = step(config())
    for changes in (
        {"sequence": "whole"},
        {"rope": "1d"},
        {"gram_scope": "micro_batch"},
        {"gram_positions": "masked"},
        {"gram_clipped": False},
        {"mim_reduction": "micro_batch"},
        {"mim_reduction": "image"},
        {"gram_reduction": "image"},
    ):
        other = step(config(**changes))
        assert sum(abs(other[loss] - plain[loss]) for loss in ("loss_mim", "loss_gram")) > 1e-5, changes
    assert step(config(attention="causal", sequence="whole"))["loss_mim"] != step(config(sequence="whole"))["loss_mim"]


@pytest.mark.parametrize("name", ["laver_mask_token", "laver_head.fc1.weight"])
def test_gradients_equal_finite_differences(name):
    settings = config()
    state = {n: w.double() for n, w in tiny.random_state(settings).items()}
    teacher = tiny.random_teacher(settings, seed=5)
    batches = [tiny.random_batch((1, 0), seed=0)]
    hidden = masks(batches, 0.5)

    def total(moved: torch.Tensor) -> float:
        found = reference_laver_step({**state, name: moved}, teacher, settings, batches, hidden)
        return float(found["loss_lm"] + 0.5 * found["loss_pre"] + found["loss_mim"] + found["loss_gram"])

    gradient = reference_laver_step(state, teacher, settings, batches, hidden)["grads"][name].flatten()
    for entry in (0, 3):
        shift = torch.zeros_like(state[name]).flatten()
        shift[entry] = 1e-6
        moved = [total(state[name] + sign * shift.view_as(state[name])) for sign in (1, -1)]
        assert gradient[entry].item() == pytest.approx((moved[0] - moved[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_the_projectors_gradient_without_its_stopped_parts_equals_finite_differences():
    """The teacher's input is stopped too, so the Gram and MIM targets are held by a teacher that sees nothing new."""
    settings = replace(config(), pre_layers=(), mim_weight=0.0, gram_weight=0.0)
    state = {n: w.double() for n, w in tiny.random_state(settings).items()}
    teacher, batches = tiny.random_teacher(settings, seed=5), [tiny.random_batch((1, 0), seed=0)]
    name = "vision_projection.0.bias"
    shift = torch.zeros_like(state[name])
    shift[2] = 1e-6
    gradient = reference_laver_step(state, teacher, settings, batches, masks(batches, 0.5))["grads"][name][2]
    moved = [
        reference_laver_step({**state, name: state[name] + s * shift}, teacher, settings, batches, masks(batches, 0.5))
        for s in (1, -1)
    ]
    difference = (moved[0]["loss_lm"] - moved[1]["loss_lm"]).item() / 2e-6
    assert gradient.item() == pytest.approx(difference, rel=1e-5, abs=1e-8)
