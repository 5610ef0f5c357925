"""Which layers compute in FP8, by Megatron's own words; that evaluations do not; that lengths can be multiplied in it.

What FP8 computes is compared with bf16 in tests/gpu.
"""

from types import SimpleNamespace

import pytest
from megatron.core.fp8_utils import is_first_last_bf16_layer

from nemo_pre.config.compose import compose_run
from nemo_pre.neva.build import build_neva_config
from nemo_pre.neva.fp8 import without_fp8
from nemo_pre.neva.model import MCoreVisualNevaModel
from tests.neva.fp8_ranks import asks_for_new_copies
from tests.ranks import run_ranks


def neva_config(*overrides):
    return build_neva_config(compose_run(["experiment=digits_tiny", *overrides]), on_gpu=False)


@pytest.mark.parametrize(
    ("name", "recipe", "number_format", "bf16"),
    [
        ("fp8_delayed", "delayed", "hybrid", []),
        ("fp8_tensorwise", "tensorwise", "hybrid", [0, 3]),
        ("fp8_blockwise", "blockwise", "e4m3", [0, 3]),
    ],
)
def test_the_decoder_alone_gets_the_recipe_and_its_ends_stay_bf16(name, recipe, number_format, bf16):
    config = neva_config(f"precision={name}", "model.language.num_layers=4")
    decoder = config.language_transformer_config
    assert (decoder.fp8, decoder.fp8_recipe) == (number_format, recipe)
    assert (decoder.fp8_amax_history_len, decoder.fp8_amax_compute_algo) == (1024, "max")
    assert not decoder.fp8_param, "weights stay what an export and another precision can read"
    assert [layer for layer in range(4) if is_first_last_bf16_layer(decoder, layer)] == bf16
    assert config.vision_projection_config.fp8 is None


def test_the_number_of_bf16_layers_is_an_option():
    config = neva_config("precision=fp8_tensorwise", "precision.bf16_layers=2", "model.language.num_layers=6")
    decoder = config.language_transformer_config
    assert [layer for layer in range(6) if is_first_last_bf16_layer(decoder, layer)] == [0, 1, 4, 5]


@pytest.mark.parametrize(("precision", "asks"), [("fp8_tensorwise", True), ("fp8_delayed", True), ("bf16", False)])
def test_every_step_begins_with_new_fp8_copies_of_the_weights(precision, asks):
    """Transformer Engine keeps them over a step's micro-batches; told of no new step, it keeps the first ones."""
    assert run_ranks(asks_for_new_copies, 1, precision) == [asks]


def test_bf16_and_fp32_know_nothing_of_fp8():
    for name in ("bf16", "fp32"):
        assert neva_config(f"precision={name}").language_transformer_config.fp8 is None


def test_nothing_is_computed_in_fp8_inside_an_evaluation_even_if_it_fails():
    shared, other = SimpleNamespace(fp8="hybrid"), SimpleNamespace(fp8="e4m3")

    def fail_inside():
        with without_fp8([shared, shared, other]):  # chunks may share a config
            assert shared.fp8 is None and other.fp8 is None
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert (shared.fp8, other.fp8) == ("hybrid", "e4m3")


def test_with_fp8_a_rank_has_a_multiple_of_sixteen_tokens_of_every_sequence():
    def lengths(fp8, longest, recipe="tensorwise"):
        chunk = SimpleNamespace(
            config=SimpleNamespace(language_transformer_config=SimpleNamespace(fp8=fp8, fp8_recipe=recipe)),
            tp_comm_overlap_lm=False,
            sequence_parallel_lm=True,
            max_sequence_length=2048,
            shard_factor=8,  # TP2 with sequence parallelism x CP2
        )
        chunk._length_factor = MCoreVisualNevaModel._length_factor.fget(chunk)
        return (
            MCoreVisualNevaModel.padded_length(chunk, longest),
            MCoreVisualNevaModel.sharded_length(chunk, longest),
        )

    assert lengths(None, 9) == (16, 16)
    assert lengths("hybrid", 9) == (128, 128)
    assert lengths("hybrid", 129) == (256, 256)
    assert lengths("hybrid", 5000)[0] == 2048
    assert lengths("e4m3", 9, "blockwise") == (1024, 1024), "a rank's shard is gathered in whole blocks"


@pytest.mark.parametrize("experiment", ["llava15_7b_stage2_full_pre", "siglip2_qwen25_7b_stage2_full_pre"])
def test_a_decoder_of_every_family_has_fused_kernels_on_a_gpu(experiment, monkeypatch):
    """NeMo's Qwen2 asks for none of them, and would keep five of its MLP's widths a token instead of three."""
    from megatron.core.models.common.embeddings import rope_utils

    from nemo_pre.neva import build

    monkeypatch.setattr(build, "_fused", lambda on_gpu: on_gpu)
    for name in ("fused_apply_rotary_pos_emb", "fused_apply_rotary_pos_emb_thd"):
        monkeypatch.setattr(rope_utils, name, lambda *_: None, raising=False)
    config = compose_run([f"experiment={experiment}"])
    for on_gpu in (True, False):
        decoder = build_neva_config(config, on_gpu).language_transformer_config
        fused = (decoder.bias_activation_fusion, decoder.bias_dropout_fusion, decoder.apply_rope_fusion)
        assert fused == (on_gpu, on_gpu, on_gpu)
