"""Models of Megatron-Core's own that objectives are attached to, in the tiny shape, and the names of their weights.

They need what Megatron has for Transformer Engine alone; on a CPU its own layers stand in.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

BLOCK = "*-"  # attention and the MLP behind it


def hybrid_config(config: Any, run: Any) -> Any:
    """The run's model with a ``HybridModel`` of as many blocks as it has layers."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from nemo_pre.core.hybrid import with_hybrid_decoder

    parts = config.language_transformer_config.transformer_layer_spec(config.language_transformer_config).submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=parts.input_layernorm,
        self_attention=parts.self_attention,
        self_attn_bda=parts.self_attn_bda,
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=parts.pre_mlp_layernorm, mlp=parts.mlp, mlp_bda=parts.mlp_bda)
    stack = ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
    chunks = run.parallel.pipeline * (run.parallel.virtual_pipeline or 1)
    blocks = run.model.language.num_layers // chunks
    return with_hybrid_decoder(config, stack, "|".join([BLOCK * blocks] * chunks))


def hybrid_name(name: str) -> str:
    """A weight of the oracle's by its name in a ``HybridModel``."""

    def layer(found: re.Match[str]) -> str:
        number = 2 * int(found[1]) + found[2].startswith(("mlp", "pre_mlp"))
        return f"decoder.layers.{number}.{found[2]}"

    return re.sub(r"decoder\.layers\.(\d+)\.(.*)$", layer, name.replace("final_layernorm", "final_norm"))


def oracle_name(name: str) -> str:
    """The other way."""
    name = name.replace("final_norm", "final_layernorm")
    return re.sub(r"decoder\.layers\.(\d+)\.", lambda found: f"decoder.layers.{int(found[1]) // 2}.", name)


class Tower(nn.Module):
    """Our tower in the place of Megatron's, which computes in float32 alone and has other weights."""

    class_token_len = 1

    def __init__(self, config: Any, feature_layer: int) -> None:
        super().__init__()
        from nemo_pre.neva.vision import freeze_unused_layers

        self.tower = config.configure_model().eval()
        self.feature_layer = feature_layer
        freeze_unused_layers(self.tower, feature_layer)

    def set_input_tensor(self, _: Any) -> None:
        pass

    def forward(self, images: Any) -> Any:
        return self.tower(images, output_hidden_states=True).hidden_states[self.feature_layer]


def llava_chunks(config: Any, run: Any) -> list[nn.Module]:
    """Chunks of an unmodified ``LLaVAModel`` with the run's sizes."""
    from types import SimpleNamespace

    from megatron.core import parallel_state as ps
    from megatron.core.enums import ModelType
    from megatron.core.models.multimodal.llava_model import LLaVAModel

    decoder, vision = config.language_transformer_config, config.vision_transformer_config
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    for name in (*names, "virtual_pipeline_model_parallel_size", "sequence_parallel", "pipeline_dtype"):
        setattr(decoder, name, getattr(config, name))
    for name in ("batch_p2p_sync", "overlap_p2p_comm", "batch_p2p_comm", "microbatch_group_size_per_vp_stage"):
        setattr(decoder, name, getattr(config, name))
    chunks = []
    for stage in range(run.parallel.virtual_pipeline or 1):
        vp_stage = stage if run.parallel.virtual_pipeline else None
        first = ps.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        model = LLaVAModel(
            language_transformer_config=decoder,
            language_transformer_layer_spec=decoder.transformer_layer_spec(decoder),
            language_vocab_size=decoder.vocab_size,
            language_max_sequence_length=decoder.seq_length,
            vision_transformer_config=SimpleNamespace(vision_model_type="clip", hidden_size=vision.hidden_size),
            vision_transformer_layer_spec=None,
            drop_vision_class_token=True,
            vision_projection_config=None,
            vision_projection_layer_spec=None,
            language_position_embedding_type="rope",
            pre_process=first,
            post_process=ps.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            add_encoder=False,
            img_h=vision.image_size,
            img_w=vision.image_size,
            patch_dim=vision.patch_size,
            vp_stage=vp_stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        if first:
            model.add_encoder = model._drop_vision_class_token = True
            model.vision_model = Tower(vision, config.vision_feature_layer)
            model.vision_projection = config.vision_projection_config.configure_model()
        chunks.append(model)
    return chunks


def llava_name(name: str) -> str:
    """A weight of the oracle's by its name in such a ``LLaVAModel``."""
    return re.sub(r"^vision_model\.", "vision_model.tower.", name)


def llava_forward_step(iterator: Any, model: Any) -> Any:
    """What a user of ``LLaVAModel`` writes, who knows nothing of micro-batches' plans."""
    import torch

    from nemo_pre.core.steps import summed_loss

    batch = next(iterator)
    images = batch["media"] if batch["media"] is not None else torch.zeros(0, 3, 8, 8)
    output, mask = model(
        images,
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
        num_image_tiles=torch.tensor(batch["num_media_tiles"] or [], dtype=torch.int),
    )
    return output, lambda losses: summed_loss((losses, mask))
