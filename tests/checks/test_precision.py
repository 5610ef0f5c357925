"""FP8 is refused where it cannot run, and its options warn where they say nothing."""

import pytest

from nemo_pre.checks.run import check_options
from nemo_pre.config.compose import compose_run

RECIPES = ("fp8_delayed", "fp8_tensorwise", "fp8_blockwise")


def elsewhere(*overrides):
    """A 7B run that is only looked at here."""
    experiment = ["experiment=llava15_7b_stage2_full", "cluster=h100_4nodes", "parallel=tp2_dp8_sp", "dry_run=true"]
    return compose_run([*experiment, "parallel.data=16", *overrides])


@pytest.mark.parametrize("name", RECIPES)
def test_every_fp8_recipe_is_accepted_for_a_cluster_and_refused_without_a_gpu(name):
    assert check_options(elsewhere(f"precision={name}")) == check_options(elsewhere("precision=bf16"))
    here = ["experiment=digits_tiny", f"precision={name}", "data.sequence_length=96", "platform=cpu"]
    with pytest.raises(ValueError, match=f"precision={name} needs a GPU and this run has none"):
        check_options(compose_run(here))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["precision.amax_history=0"], "precision.amax_history=0 must be 1 or more."),
        (["precision.bf16_layers=-1"], "precision.bf16_layers=-1 must be 0 or more."),
        (["precision=fp8_delayed", "precision.bf16_layers=1"], "precision.bf16_layers needs fp8_tensorwise or"),
        (["precision=fp8_tensorwise", "precision.bf16_layers=33"], "precision.bf16_layers=33 must be at most 32"),
        (
            ["precision=fp8_delayed", "model.language.ffn_hidden_size=11000"],
            "needs ffn_hidden_size / parallel.tensor divisible by 16, not 5500",
        ),
        (
            ["precision=fp8_delayed", "data.sequence_length=2040"],
            r"data.sequence_length=2040 must be a multiple of 32 with precision=fp8_delayed \(16 tokens x 2 shards\).",
        ),
    ],
)
def test_what_fp8_cannot_multiply_is_refused_in_one_sentence(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_options(elsewhere(*overrides))


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["precision=bf16", "precision.bf16_layers=1"], "precision.bf16_layers has no effect with precision=bf16."),
        (["precision=fp8_tensorwise", "precision.amax_history=16"], "precision.amax_history has no effect with"),
    ],
)
def test_options_of_another_recipe_warn(overrides, warning):
    assert any(said.startswith(warning) for said in check_options(elsewhere(*overrides)))
