"""Plain NeVA stays NeMo's NeVA: same weights, same batch, the same bits; and NeVA's defects are not ours."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from tests.ranks import run_ranks
from tests.reference import tiny

GIVEN = ("init_method_std", "layernorm_epsilon")  # which a run's configuration always says
BATCHES = {"one image each": (1, 1), "uneven": (0, 2), "several": (2, 3)}


def stock_config(run: Any) -> Any:
    """NeMo's own configuration of the same model; the tower alone, of which NeMo has another, is ours."""
    from nemo.collections.llm.gpt.model.base import local_layer_spec
    from nemo.collections.llm.gpt.model.llama import LlamaConfig
    from nemo.collections.vlm.neva.model.base import NevaConfig
    from nemo.collections.vlm.vision.base import MultimodalProjectorConfig

    from nemo_pre.compat.cpu_backend import TRANSFORMER_CONFIG
    from nemo_pre.config.derived import padded_vocab_size, projector_widths
    from nemo_pre.neva.vision import VisionTowerConfig

    language = run.model.language
    inputs, inner, outputs = projector_widths(run.model)
    decoder = LlamaConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        seq_length=run.data.sequence_length,
        vocab_size=padded_vocab_size(language.vocab_size),
        rotary_base=language.rotary_base,
        layernorm_epsilon=language.layernorm_epsilon,
        transformer_layer_spec=local_layer_spec,
        scatter_embedding_sequence_parallel=False,
        **TRANSFORMER_CONFIG,
    )
    return NevaConfig(
        language_transformer_config=decoder,
        vision_transformer_config=VisionTowerConfig(run.model.vision, run.seed),
        vision_projection_config=MultimodalProjectorConfig(
            projector_type=run.model.projector,
            input_size=inputs,
            hidden_size=outputs,
            ffn_hidden_size=inner,
            **TRANSFORMER_CONFIG,
        ),
        vision_feature_layer=run.model.vision.feature_layer,
        drop_vision_class_token=run.model.vision.drop_class_token,
        **TRANSFORMER_CONFIG,
    )


def compare(images_per_sample: tuple[int, ...]) -> dict[str, Any]:
    """On a rank: loss, mask and gradients of NeMo's chunk and of ours."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from nemo.collections.vlm.neva.model.base import MCoreNevaModel

    from nemo_pre.neva.build import build_neva_config
    from nemo_pre.train import prepare_process
    from tests.parity.shape import tiny_run

    run = tiny_run(os.devnull, {}, pre=None, num_microbatches=1, micro_batch_size=len(images_per_sample), max_steps=1)
    prepare_process(run)
    dist.init_process_group("gloo")
    ps.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0)
    config = build_neva_config(run, on_gpu=False)
    ours = config.configure_model()
    stock = MCoreNevaModel(config=stock_config(run), drop_vision_class_token=config.drop_vision_class_token)
    stock.load_state_dict(ours.state_dict())
    batch = tiny.random_batch(images_per_sample, seed=1)
    inputs = {
        "input_ids": batch["tokens"],
        "position_ids": batch["position_ids"],
        "images": batch["media"],
        "labels": batch["labels"],
        "loss_mask": batch["loss_mask"],
        "num_image_tiles": batch["num_media_tiles"],
    }
    outcome: dict[str, Any] = {}
    for name, model in (("ours", ours), ("stock", stock)):
        loss, mask = model(**inputs)
        (loss * mask).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        outcome[name] = (loss[mask > 0].detach(), mask, grads)
    torch.distributed.destroy_process_group()
    return outcome


FUSED_HERE = ("bias_activation_fusion", "bias_dropout_fusion", "apply_rope_fusion")


def decoders() -> dict[str, dict[str, Any]]:
    """What Megatron is told of a decoder beside its sizes, by NeMo's classes and by ours: the fields that differ."""
    from dataclasses import fields

    from megatron.core.transformer.transformer_config import TransformerConfig
    from nemo.collections.llm.gpt.model.llama import LlamaConfig
    from nemo.collections.llm.gpt.model.qwen2 import Qwen2Config

    from nemo_pre.neva.decoder import DecoderConfig, family_options

    found: dict[str, dict[str, Any]] = {}  # of what is not built: fused, it needs a GPU's kernels
    for family, stock in (("llama", LlamaConfig), ("qwen2", Qwen2Config)):
        theirs = {field.name: field.default for field in fields(stock)}
        ours = {field.name: field.default for field in fields(DecoderConfig)} | family_options(family)
        said = [field.name for field in fields(TransformerConfig) if field.name not in GIVEN]
        found[family] = {name: (theirs[name], ours[name]) for name in said if repr(theirs[name]) != repr(ours[name])}
    return found


def test_megatron_is_told_of_a_decoder_what_nemo_tells_it():
    """But for kernels that NeMo's Qwen2 leaves unfused: its layers are Llama's."""
    (found,) = run_ranks(decoders, 1)
    assert found == {"llama": {}, "qwen2": dict.fromkeys(FUSED_HERE, (False, True))}


@pytest.mark.parametrize("images", BATCHES.values(), ids=BATCHES)
def test_without_pre_losses_and_gradients_are_nevas_bit_for_bit(images):
    (outcome,) = run_ranks(compare, 1, images)
    (loss, mask, grads), (stock_loss, stock_mask, stock_grads) = outcome["ours"], outcome["stock"]
    assert loss.numel() and loss.equal(stock_loss)
    assert mask.equal(stock_mask)
    unused = stock_grads.keys() - grads.keys()  # behind the feature layer: frozen here, without effect there
    assert all(not stock_grads[name].any() for name in unused)
    assert grads.keys() == stock_grads.keys() - unused
    assert not [name for name in grads if not grads[name].equal(stock_grads[name])]


def padded(longest: int, **flags: Any) -> int:
    """:meth:`MCoreVisualNevaModel.padded_length` on nothing but the attributes it reads."""
    from nemo_pre.neva.model import MCoreVisualNevaModel

    class Chunk(SimpleNamespace):
        shard_factor = MCoreVisualNevaModel.shard_factor
        _length_factor = MCoreVisualNevaModel._length_factor

    attributes: dict[str, Any] = dict(
        tp_comm_overlap_lm=False,
        context_parallel_lm=1,
        sequence_parallel_lm=False,
        tensor_model_parallel_size_lm=1,
        max_sequence_length=64,
        config=SimpleNamespace(language_transformer_config=SimpleNamespace(fp8=None)),
    )
    return MCoreVisualNevaModel.padded_length(Chunk(**(attributes | flags)), longest)


def lengths() -> dict[str, int]:
    sp = dict(sequence_parallel_lm=True, tensor_model_parallel_size_lm=4)
    return {
        "plain": padded(37),
        "SP": padded(37, **sp),
        "CP": padded(37, context_parallel_lm=2),
        "CP and SP": padded(37, context_parallel_lm=2, **sp),
        "too long": padded(90),
        "TP overlap, short": padded(37, tp_comm_overlap_lm=True, **sp),
        "TP overlap, full length": padded(64, tp_comm_overlap_lm=True, **sp),  # unbound padded_seq_len in NeVA
    }


def test_sequences_are_padded_to_what_the_layout_needs_and_no_further():
    (found,) = run_ranks(lengths, 1)
    assert found == {
        "plain": 37,
        "SP": 40,
        "CP": 40,
        "CP and SP": 48,
        "too long": 64,
        "TP overlap, short": 64,
        "TP overlap, full length": 64,
    }
