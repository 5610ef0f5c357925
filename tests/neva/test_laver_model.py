"""A chunk with LaVer: nothing leaks between images, the teacher disturbs nothing, text is turned as ever."""

from __future__ import annotations

import pytest
import torch

from tests.neva.laver_ranks import (
    change_an_image,
    late_weights,
    refusal_of_a_causal_layer,
    teacher_side_effects,
    text_logits,
)
from tests.ranks import run_ranks


@pytest.mark.parametrize("number", [0, 1, 2])
def test_changing_one_images_pixels_changes_no_other_images_block_and_no_earlier_text(number):
    ((before, after),) = run_ranks(change_an_image, 1, number)
    for states in ("student", "teacher"):
        differs = (before[states] != after[states]).any(-1)
        own = before["branch_image"] == number
        assert differs[own].all(), "every token of the image sees every other, masked or not"
        assert not differs[~own].any()
    differs = (before["logits"] != after["logits"]).any(-1)
    for row in range(2):
        inside = (before["image"][row] == number).nonzero().squeeze(1)
        if not len(inside):
            assert not differs[row].any(), "another sample"
            continue
        assert not differs[row, : inside[0]].any(), "earlier text and images"
        assert differs[row, inside[0] :].all(), "the image from its first token on, and what follows"


def test_the_teacher_starts_as_the_student_follows_it_and_touches_nothing_else():
    (found,) = run_ranks(teacher_side_effects, 1)
    assert found["starts as the student"]
    assert found["random states"], "running or moving the teacher drew random numbers"
    assert not any(found["trains"]) and found["in training mode"] is False
    assert found["moved by"] == pytest.approx([0.125] * len(found["moved by"]), abs=1e-6)


def test_the_teachers_layers_wait_for_weights_that_are_still_under_way():
    (found,) = run_ranks(late_weights, 1)
    assert not torch.equal(*found["after"]), "the second teacher's weights were there already: nothing is tested"
    assert torch.equal(*found["states"])


def test_layers_that_are_causal_are_refused_where_mixed_attention_is_asked_for():
    (said,) = run_ranks(refusal_of_a_causal_layer, 1)
    assert said.startswith("Mixed attention or packing was asked for, but decoder layer 1 has DotProductAttention")


def test_text_has_the_same_logits_with_one_axis_of_positions_and_with_two_bit_for_bit():
    (answers,) = run_ranks(text_logits, 1)
    assert torch.equal(answers["1d"], answers["2d"])
    torch.testing.assert_close(answers["mixed 2d"], answers["1d"], rtol=1e-5, atol=1e-6)  # another attention kernel
