"""L_LM, L_PRe, L_MIM, L_CGA and the gradient of every parameter agree with LaVer's oracle in every layout.

The oracle (:mod:`tests.reference.neva_laver`) computes in float64, one sample and one image at a time; the product in
float32 on gloo ranks, with all sequences side by side. Teacher and student have different weights, or L_CGA and its
gradient would vanish. Tolerances as in :mod:`tests.parity.test_parity`, but for what the temperatures do: dividing by
0.04 and 0.1 amplifies the rounding of logits, so that the oracle itself, computing in float32, is wrong by up to
3.2e-5 of a gradient's norm on this data. L_MIM and L_CGA are compared to 1e-5 relative, gradients to 1e-4 (4.4e-5 was
the most that was seen).

L_CGA is a mean of squared differences of similarities. An error d in those moves it by up to 2 d sqrt(L_CGA), which is
more than 1e-5 of it where teacher and student nearly agree: in float32 the oracle is wrong by up to 2.0e-7
sqrt(L_CGA), and 5e-7 sqrt(L_CGA) is allowed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_pre.objectives.laver.masks import visual_token_masks
from tests.parity.job import Job
from tests.parity.layouts import EVERY_LAYOUT, LAYOUTS, on_both
from tests.parity.test_parity import IMAGES, LOSS_LM, LOSS_PRE, batches, disagreements, remembered, run
from tests.ranks.sharded import assemble
from tests.reference import tiny
from tests.reference.neva_laver import LaVerReferenceConfig, reference_laver_step

SEED = 1234  # of RunConfig, which the masks follow
LOSS, SIMILARITY, GRADIENT = 1e-5, 5e-7, 1e-4

# Fields of LaVerConfig, and what the oracle calls them
PAPER: dict[str, Any] = {"mask_schedule": "constant", "mask_ratio": 0.4, "head_hidden_width": tiny.LAVER_HEAD}
RELEASED_CODE: dict[str, Any] = {
    **PAPER,
    "sequence": "whole",
    "mask_sampling": "count",
    "mask_token": "embedding",
    "mask_token_id": 7,
    "centring": True,
    "mim_reduction": "micro_batch",
    "gram_clipped": False,
    "gram_scope": "micro_batch",
}
ORACLE_FIELDS = (
    "sequence",
    "mask_token_id",
    "mim_reduction",
    "gram_reduction",
    "gram_clipped",
    "gram_scope",
    "gram_positions",
    "mim_weight",
    "gram_weight",
)


def case(
    layout: str,
    laver: dict[str, Any] = PAPER,
    pre_layers: tuple[int, ...] = (3,),
    num_microbatches: int = 4,
    rope: str = "2d",
    parallel: dict[str, Any] | None = None,
    **changes: Any,
) -> tuple[Job, LaVerReferenceConfig]:
    fields = {name: laver[name] for name in ORACLE_FIELDS if name in laver}
    axes = EVERY_LAYOUT[layout]
    groups = max(tiny.GROUPS, axes.get("tensor", 1))
    plain = tiny.tiny_config(pre_layers=pre_layers, num_query_groups=groups)
    config = LaVerReferenceConfig(**{**vars(plain), **fields, "rope": rope})
    job = Job(
        parallel={**axes, **(parallel or {})},
        pre={"layers": list(pre_layers)} if pre_layers else None,
        laver=laver,
        model={"attention": "mixed", "rope": rope},
        steps=batches(axes, num_microbatches),
        state=tiny.random_state(config),
        teacher=tiny.random_teacher(config, seed=5),
        language={"num_query_groups": groups},
    )
    return replace(job, **changes), config


def masks_of_step(job: Job, step: int) -> list[list[torch.Tensor]]:
    """masks[rank][micro-batch], by the rule that a sample's place in the global batch decides."""
    assert job.laver is not None
    ranks = job.steps[step]
    masks: list[list[torch.Tensor]] = [[] for _ in ranks]
    for r, rank in enumerate(ranks):
        for m, batch in enumerate(rank):
            images = (batch["tokens"] == -200).sum(1).tolist()
            place = (m * len(ranks) + r) * len(batch["tokens"])
            sampling = job.laver.get("mask_sampling", "bernoulli")
            masks[r].append(
                visual_token_masks(
                    images, tiny.image_sizes(batch), job.laver["mask_ratio"], sampling, SEED, step, place
                )
            )
    return masks


def check(job: Job, config: LaVerReferenceConfig) -> list[dict[str, Any]]:
    answers = []
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        masks = masks_of_step(job, step)
        for record in records:
            assert any(
                all(torch.equal(a, b) for a, b in zip(record.masks, of_rank, strict=True)) for of_rank in masks
            ), "a rank masked other tokens"
        flat = [batch for rank in data for batch in rank]
        by_image = [
            [image.tolist() for image in mask.split(tiny.image_sizes(batch))]
            for mask, batch in zip((mask for rank in masks for mask in rank), flat, strict=True)
        ]
        expected = remembered(reference_laver_step, job.state, job.teacher, config, flat, by_image)
        answers.append(expected)
        metrics = records[0].metrics
        assert metrics["reduced_train_loss"] == pytest.approx(expected["loss_lm"].item(), rel=LOSS_LM), step
        for record in records:
            found = defaultdict(float, record.metrics)  # text alone logs nothing of visual tokens
            assert found["laver/mim"] == pytest.approx(expected["loss_mim"].item(), rel=LOSS, abs=1e-12), step
            gram = expected["loss_gram"].item()
            assert found["laver/gram"] == pytest.approx(gram, rel=LOSS, abs=SIMILARITY * gram**0.5 + 1e-12), step
            assert found["laver/similarity"] == pytest.approx(float(expected["similarity"]), abs=LOSS), step
            assert found["laver/teacher_entropy"] == pytest.approx(float(expected["teacher_entropy"]), abs=1e-5), step
            if config.pre_layers:
                assert found["pre/loss"] == pytest.approx(expected["loss_pre"].item(), abs=LOSS_PRE), step
        wrong = disagreements(records, expected, GRADIENT)
        assert not wrong, f"step {step}: {wrong}"
    return answers


@pytest.mark.parametrize("layout", on_both(EVERY_LAYOUT))
def test_losses_and_gradients_of_pre_and_laver_with_four_uneven_micro_batches(layout):
    answers = check(*case(layout))
    assert sum(answer["masked"] for answer in answers) > 10


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "DP2", "CP2"])
def test_losses_and_gradients_of_one_micro_batch_without_pre(layout):
    check(*case(layout, num_microbatches=1, pre_layers=()))


@pytest.mark.parametrize(
    "layout", on_both(["one-rank", "TP2-SP", "PP2", "CP2", "DP2", "TP2-SP-PP2-CP2-DP2"], ["TP2-SP", "PP2"])
)
def test_the_released_codes_variant(layout):
    job, config = case(layout, RELEASED_CODE, rope="mrope")
    check(replace(job, steps=job.steps[:1]), config)  # the centre, which the oracle is not told, is 0 in step 0


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP"])
def test_gram_of_masked_positions_one_axis_of_positions_and_qwen2(layout):
    job, config = case(layout, {**PAPER, "gram_positions": "masked"}, rope="1d")
    config = replace(config, tie_embeddings=True)
    state = tiny.random_state(config, qkv_bias=True)
    teacher = tiny.random_teacher(config, seed=5, qkv_bias=True)
    language = {**job.language, "family": "qwen2", "tie_embeddings": True}
    check(replace(job, state=state, teacher=teacher, language=language), config)


@pytest.mark.parametrize("layout", ["one-rank", "DP2"])
def test_sums_over_an_image_and_an_output_layer_at_labelled_tokens_alone(layout):
    by_image = {**PAPER, "mim_reduction": "image", "gram_reduction": "image"}
    check(*case(layout, by_image, parallel={"labelled_output": True}))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "DP2"])
def test_zero_masked_tokens(layout):
    answers = check(*case(layout, {**PAPER, "mask_ratio": 0.0}))
    assert all(answer["masked"] == 0 and answer["loss_mim"] == 0 for answer in answers)
    assert sum(answer["loss_gram"] > 0 for answer in answers) >= 2


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2", "DP2"])
def test_one_masked_token(layout):
    """One image in the whole step, one of its four tokens masked."""
    job, config = case(layout, {**PAPER, "mask_sampling": "count", "mask_ratio": 0.25})
    ranks = LAYOUTS[layout].get("data", 1)
    step = [
        [tiny.random_batch((0, 1) if (r, m) == (0, 2) else (0, 0), seed=10 * r + m) for m in range(4)]
        for r in range(ranks)
    ]
    (answer,) = check(replace(job, steps=[step]), config)
    assert answer["masked"] == 1


@pytest.mark.parametrize("layout", ["TP2-SP", "PP2-VPP2"])
@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_activation_recompute_changes_nothing(layout, recompute):
    check(*case(layout, parallel={"recompute": recompute}))


@pytest.mark.parametrize("layout", ["one-rank", "DP2-sharded-optimizer", "PP2"])
def test_a_teacher_gathered_layer_by_layer_computes_the_same(layout):
    check(*case(layout, {**PAPER, "teacher_memory": "gathered"}))


@pytest.mark.parametrize("layout", ["TP2-SP", "PP2", "CP2"])
def test_attention_run_by_run_computes_the_same(layout):
    job, config = case(layout)
    check(replace(job, model={**job.model, "attention_backend": "split"}), config)


@pytest.mark.parametrize("layout", ["TP2-SP-DP2-sharded-optimizer", "PP2-VPP2-DP2-sharded-optimizer"])
def test_replicas_reduce_their_gradients_in_one_order_also_where_one_has_text_alone(layout):
    check(*case(layout, bucket_size=1))


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "CP2"])
def test_images_cut_off_by_the_maximum_length(layout):
    job, config = case(layout)
    steps = batches(LAYOUTS[layout], 4, answer=8)
    check(replace(job, steps=steps, max_length=12), replace(config, max_sequence_length=12))


@pytest.mark.parametrize("layout", on_both(["one-rank", "PP2", "DP2"], ["PP2"]))
def test_an_injected_gradient_wrong_by_a_factor_of_two_is_noticed_wherever_it_reaches(layout):
    job, config = case(layout, pre_layers=())
    job = replace(job, steps=job.steps[:1])
    masks = [mask.view(-1, tiny.TOKENS_PER_IMAGE).tolist() for rank in masks_of_step(job, 0) for mask in rank]
    flat = [batch for rank in job.steps[0] for batch in rank]
    expected = remembered(reference_laver_step, job.state, job.teacher, config, flat, masks)
    wrong = disagreements(run(replace(job, gradient_factor=2.0))[0], expected, GRADIENT)
    assert {"laver_mask_token", "laver_head.fc3.weight", "vision_projection.0.weight"} <= wrong.keys()
    assert sum(name.startswith("language_model.decoder") for name in wrong) > 20
    assert min(error for name, error in wrong.items() if not name.endswith("k_proj.bias")) > 20 * GRADIENT


@pytest.mark.parametrize("layout", ["one-rank", "TP2-SP", "PP2"])
def test_bf16_is_as_accurate_as_the_oracle_is_in_bf16(layout):
    """At temperature 0.04 the eight bits of a bf16 logit are coarse: the oracle in bf16 is wrong by 4 to 23% of the
    whole gradient's norm, L_MIM by 4%. The product may not be worse: 0.6 to 0.7 of the oracle's error was seen on one
    rank, losses within 2%."""
    job, config = case(layout, precision="bf16")
    state, teacher = ({n: w.bfloat16().float() for n, w in weights.items()} for weights in (job.state, job.teacher))
    job = replace(job, state=state, teacher=teacher)
    for step, (records, data) in enumerate(zip(run(job), job.steps, strict=True)):
        masks = [mask.view(-1, tiny.TOKENS_PER_IMAGE).tolist() for rank in masks_of_step(job, step) for mask in rank]
        flat = [batch for rank in data for batch in rank]
        exact, rounded = (
            remembered(reference_laver_step, state, teacher, config, flat, masks, None, dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        for name, loss in (("laver/mim", "loss_mim"), ("laver/gram", "loss_gram")):
            assert records[0].metrics.get(name, 0.0) == pytest.approx(exact[loss].item(), rel=4e-2), loss
        error = allowed = torch.zeros((), dtype=torch.float64)
        for name, gradient in assemble([rank.gradients for rank in records]).items():
            right = exact["grads"][name]
            error = error.hypot((gradient.double() - right).norm())
            allowed = allowed.hypot((rounded["grads"][name].double() - right).norm())
        assert error < allowed, step


def test_the_data_has_a_micro_batch_of_text_and_an_uneven_one():
    assert (0, 0) in IMAGES[0] and (2, 3) in IMAGES[0]


def test_no_decoder_keeps_its_last_input_until_the_next_step():
    """Nor does the teacher's: with four chunks on two stages they would be messages of four micro-batches, and their
    gradients. The language model's own attribute would have them in any layout with a pipeline."""
    for records in run(case("PP2-VPP2")[0]):
        assert [record.kept_inputs for record in records] == [0, 0]
