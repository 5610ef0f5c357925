"""VIRAL in the oracles: cases by hand, finite differences, and the product's pure losses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_pre.losses import gram_anchoring_loss, predictive_loss
from tests.reference import tiny
from tests.reference.neva_laver import LaVerReferenceConfig, reference_laver_step
from tests.reference.neva_pre import expand_sample, reference_step, split_samples
from tests.reference.viral import ViralReference, alignment_head, viral_sums

ONE_IMAGE = [[(3, 0), (4, 1)]]  # the visual tokens 0 and 1 lie at positions 3 and 4


def states(*rows: list[float]) -> list[Tensor]:
    """The hidden states of two layers: the second has the given rows from position 3 on."""
    second = torch.cat([torch.full((3, len(rows[0])), 9.0), torch.tensor(rows)]).double()
    return [torch.full_like(second, -7.0), torch.zeros_like(second), second]


def identity(width: int, depth: int = 1) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for number in range(1, depth + 1):
        state |= {f"viral_head.fc{number}.weight": torch.eye(width).double()}
        state |= {f"viral_head.fc{number}.bias": torch.zeros(width).double()}
    return state


def test_direct_is_minus_the_cosine_summed_over_tokens():
    """Parallel, and at 60 degrees: -(1 + 1/2)."""
    targets = torch.tensor([[2.0, 0.0], [1.0, 3.0**0.5]]).double()
    viral = ViralReference(layers=(2,), head_depth=1)
    sums, count = viral_sums(ONE_IMAGE, states([5.0, 0.0], [1.0, 0.0]), targets, identity(2), viral)
    assert count == 2 and sums[2].item() == pytest.approx(-1.5)


def test_similarity_sums_the_squared_difference_of_all_entries():
    """The states are at 60 degrees, the targets, of another width, at right angles: twice (1/2)^2, diagonal zero."""
    targets = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double()
    viral = ViralReference(layers=(2,), form="similarity", compared="hidden")
    sums, count = viral_sums(ONE_IMAGE, states([5.0, 0.0], [1.0, 3.0**0.5]), targets, {}, viral)
    assert count == 4 and sums[2].item() == pytest.approx(2 * 0.25)


def test_similarity_compares_within_an_image_only():
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    viral = ViralReference(layers=(2,), form="similarity", compared="hidden")
    apart = [[(3, 0)], [(4, 1)]]
    sums, count = viral_sums(apart, states([5.0, 0.0], [5.0, 1.0]), targets, {}, viral)
    assert count == 2 and sums[2].item() == pytest.approx(0.0)


def test_the_head_is_linear_layers_with_silu_between_them_and_none_behind():
    x = torch.tensor([-1.0, 2.0]).double()
    state = identity(2, depth=3)
    state["viral_head.fc3.bias"] += 10.0
    expected = F.silu(F.silu(x)) + 10.0
    torch.testing.assert_close(alignment_head(x, 1, state, ViralReference((1,))), expected)
    torch.testing.assert_close(alignment_head(x, 1, state, ViralReference((1,), head_depth=1)), x)


# --- whole steps ----------------------------------------------------------------------------------------------------

MAX_LENGTH = 11
FORMS = [
    ViralReference((2,)),
    ViralReference((1, 3), form="similarity", compared="hidden"),
    ViralReference((1, 4), form="similarity", shared_head=False, weight=0.3),
    ViralReference((2, 3), target="encoder", head_depth=2),
]


def name(viral: ViralReference) -> str:
    return f"{viral.form}-{viral.compared}-{viral.target}"


def batches() -> list[dict[str, Any]]:
    """Samples with two, no, one, three and one images; the maximum length cuts the third of three."""
    some = [tiny.random_batch((2, 0, 1), seed=5), tiny.random_batch((3, 1), seed=6)]
    return [tiny.with_targets(batch, seed) for seed, batch in enumerate(some)]


def setting(viral: ViralReference, length: int = MAX_LENGTH) -> tuple[Any, dict[str, Tensor]]:
    config = tiny.tiny_config(viral=viral, max_sequence_length=length)
    return config, tiny.random_state(config)


def test_counts_are_those_of_the_tokens_that_entered():
    data = batches()
    sizes = []
    for sample in split_samples(data):
        source, _, _ = expand_sample(sample["tokens"], sample["labels"], sample["loss_mask"], 4, MAX_LENGTH)
        entered = [index // 4 for kind, index in source if kind == "image"]
        sizes += [entered.count(image) for image in set(entered)]
    assert sum(sizes) < 7 * 4 and set(sizes) != {4}, "no image is cut"
    for viral, count in ((FORMS[0], sum(sizes)), (FORMS[1], sum(size**2 for size in sizes))):
        assert reference_step(setting(viral)[1], setting(viral)[0], data)["viral_count"] == count


@pytest.mark.parametrize("viral", FORMS, ids=name)
def test_the_term_is_the_mean_over_the_global_batch_and_then_over_layers(viral):
    config, state = setting(viral)
    data = batches()
    a, b, both = (reference_step(state, config, some) for some in (data[:1], data[1:], data))
    assert a["viral_count"] != b["viral_count"]
    total = a["loss_viral"] * a["viral_count"] + b["loss_viral"] * b["viral_count"]
    torch.testing.assert_close(both["loss_viral"], total / both["viral_count"])
    layers = list(both["loss_viral_by_layer"].values())
    assert len(layers) == len(viral.layers)
    torch.testing.assert_close(both["loss_viral"], torch.stack(layers).mean())


def test_text_alone_has_no_term_and_gives_no_gradient():
    config, state = setting(FORMS[0])
    step = reference_step(state, config, [tiny.with_targets(tiny.random_batch((0, 0), seed=3))])
    assert step["viral_count"] == 0 and step["loss_viral"] == 0
    assert not any(gradient.any() for key, gradient in step["grads"].items() if key.startswith("viral"))


@pytest.mark.parametrize("viral", FORMS, ids=name)
def test_gradients_equal_finite_differences(viral):
    """Of the weights behind the target's stop: language model and heads, whose target does not move."""
    config, state = setting(viral)
    state = {key: value.double() for key, value in state.items()}
    data = [tiny.with_targets(tiny.random_batch((2,), seed=5))]
    grads = reference_step(state, config, data)["grads"]

    def total(key: str, place: tuple[int, int], delta: float) -> float:
        moved = {**state, key: state[key].clone()}
        moved[key][place] += delta
        step = reference_step(moved, config, data)
        return float(step["loss_lm"] + viral.weight * step["loss_viral"])

    head = [key for key in state if key.startswith("viral") and key.endswith("weight")]
    for key in ["language_model.decoder.layers.0.mlp.linear_fc2.weight", *head]:
        place = divmod(int(grads[key].abs().argmax()), grads[key].shape[1])
        numeric = (total(key, place, 1e-5) - total(key, place, -1e-5)) / 2e-5
        assert abs(numeric) > 1e-6
        assert grads[key][place].item() == pytest.approx(numeric, rel=1e-5)


def test_the_encoder_as_target_gets_no_gradient_from_being_compared_with():
    """A head that ignores its input: only its last bias learns."""
    config, state = setting(FORMS[3])
    state["viral_head.fc1.weight"].zero_()
    data = batches()
    for batch in data:
        batch["loss_mask"].zero_()
    grads = reference_step(state, config, data)["grads"]
    assert grads["viral_head.fc2.bias"].any()
    assert not any(gradient.any() for key, gradient in grads.items() if key.startswith(("vision", "language")))


def test_all_tiles_of_an_image_are_one_image():
    """An image of two tiles has the pairs of all its eight tokens, and each tile the features of its own place."""
    whole = tiny.with_targets(tiny.random_batch((1,), seed=8))
    media = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    features = torch.randn(2, 4, tiny.TARGET_WIDTH, generator=torch.Generator().manual_seed(3))
    tiled = {**whole, "media": media, "num_media_tiles": [2], "targets": {"viral": features}}
    config, state = setting(FORMS[1], length=tiny.MAX_LENGTH)
    assert reference_step(state, config, [tiled])["viral_count"] == 8**2
    config, state = setting(FORMS[0], length=tiny.MAX_LENGTH)
    step = reference_step(state, config, [tiled])
    assert step["viral_count"] == 8
    swapped = {**tiled, "targets": {"viral": features.flip(0)}}
    assert abs(reference_step(state, config, [swapped])["loss_viral"] - step["loss_viral"]) > 1e-3


@pytest.mark.parametrize("viral", FORMS, ids=name)
def test_the_laver_oracle_has_the_same_term(viral):
    config, state = setting(viral)
    laver = LaVerReferenceConfig(**{**vars(config), "attention": "causal", "rope": "1d", "laver": False})
    data = batches()
    expected = reference_step(state, config, data)
    masks = [[[False] * 4] * len(batch["num_media_tiles"]) for batch in data]
    found = reference_laver_step(state, {}, laver, data, masks)
    assert found["viral_count"] == expected["viral_count"]
    torch.testing.assert_close(found["loss_viral"], expected["loss_viral"])
    for key, gradient in expected["grads"].items():
        torch.testing.assert_close(found["grads"][key], gradient, msg=key)


# --- the product's losses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.bfloat16, 1e-5)])
@pytest.mark.parametrize("form", ["direct", "similarity"])
def test_the_pure_losses_are_the_terms_of_the_oracle(form, dtype, tolerance):
    """Images of 5, 1 and 3 tokens; the target is wider than the states, and the head brings them to its width."""
    generator = torch.Generator().manual_seed(1)
    sizes = [5, 1, 3]
    places = [list(range(start, end)) for start, end in pairwise([0, 5, 6, 9])]
    images = [[(position, position) for position in place] for place in places]
    ids = torch.tensor([image for image, size in enumerate(sizes) for _ in range(size)])
    width = 11 if form == "direct" else 6
    x = torch.randn(9, width, generator=generator, dtype=torch.float64).to(dtype)
    target = torch.randn(9, 11, generator=generator, dtype=torch.float64).to(dtype)
    compared = "hidden" if form == "similarity" else "head"
    viral = ViralReference((1,), form=form, compared=compared, head_depth=1)
    slow = x.double().clone().requires_grad_()
    sums, count = viral_sums(images, [slow, slow], target.double(), identity(11), viral)
    fast = x.clone().requires_grad_()
    if form == "direct":
        loss, found = predictive_loss(fast, target)
    else:
        loss, found = gram_anchoring_loss(fast, target, ids, clipped=False)
    assert found == count
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), sums[1], rtol=tolerance, atol=tolerance)
    loss.backward()
    sums[1].backward()
    rounding = tolerance if dtype == torch.float64 else 2**-8
    torch.testing.assert_close(fast.grad.double(), slow.grad, rtol=2 * rounding, atol=rounding)


def test_no_term_leaves_the_step_as_it_was():
    config, state = setting(FORMS[0])
    plain = replace(config, viral=ViralReference())
    data = batches()
    step = reference_step(state, plain, data)
    assert step["loss_viral"] == 0
    expected = reference_step(state, replace(config, viral=replace(FORMS[0], weight=0.0)), data)
    for key in state:
        torch.testing.assert_close(step["grads"][key], expected["grads"][key])
