"""The decoder's configuration: Megatron's, with what its ``GPTModel`` takes beside it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

# What a decoder of each family says to Megatron beside the sizes, as NeMo's LlamaConfig and Qwen2Config do; but the
# three fusions NeMo's Qwen2 leaves out, and computes SwiGLU and rotary embedding by PyTorch's operations one by one,
# which keep five of the MLP's widths for the backward pass instead of three.
ALL_FAMILIES: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": nn.functional.silu,
    "gated_linear_unit": True,
    "add_bias_linear": False,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_softmax_in_fp32": False,
    "masked_softmax_fusion": True,
    "cross_entropy_loss_fusion": True,
    "deallocate_pipeline_outputs": True,
    "bias_activation_fusion": True,
    "bias_dropout_fusion": True,
    "apply_rope_fusion": True,
    # A CUDA extension of Apex, without which Megatron refuses it.
    "gradient_accumulation_fusion": importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"persist_layer_norm": True},
    "qwen2": {"add_qkv_bias": True},
}


@dataclass
class DecoderConfig(TransformerConfig):
    """Megatron's configuration of the decoder.

    Attributes:
        transformer_layer_spec: gives the layers' specification for this configuration.
        vocab_size: padded, so that every tensor-parallel size divides it.
        seq_length: the most tokens of a sequence, images included.
        position_embedding_type, rotary_base, share_embeddings_and_output_weights, scatter_embedding_sequence_parallel:
            see ``GPTModel``.
    """

    transformer_layer_spec: Callable[[Any], Any] | None = None
    vocab_size: int = 0
    seq_length: int = 0
    position_embedding_type: str = "rope"
    rotary_base: float = 10000.0
    share_embeddings_and_output_weights: bool = False
    scatter_embedding_sequence_parallel: bool = False

    def build(self, pre_process: bool, post_process: bool, vp_stage: int | None) -> nn.Module:
        """This rank's chunk of the decoder, with the embedding if it is the first and the output layer if the last."""
        assert self.transformer_layer_spec is not None
        return GPTModel(
            self,
            transformer_layer_spec=self.transformer_layer_spec(self),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
            **self.of_every_stage(),
        )

    def of_every_stage(self) -> dict[str, Any]:
        """What Megatron's models take beside the configuration, the same for every chunk."""
        return {
            "vocab_size": self.vocab_size,
            "max_sequence_length": self.seq_length,
            "share_embeddings_and_output_weights": self.share_embeddings_and_output_weights,
            "position_embedding_type": self.position_embedding_type,
            "rotary_base": self.rotary_base,
            "scatter_embedding_sequence_parallel": self.scatter_embedding_sequence_parallel,
        }


def family_options(family: str) -> dict[str, Any]:
    """What Megatron is told of a decoder of ``family``."""
    return ALL_FAMILIES | FAMILIES[family]


def local_layer_spec(config: TransformerConfig) -> Any:
    """Megatron's own layers, on any device."""
    return gpt_layer_specs.get_gpt_layer_local_spec(normalization=config.normalization)


def fused_layer_spec(config: TransformerConfig) -> Any:
    """Transformer Engine's layers."""
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()
