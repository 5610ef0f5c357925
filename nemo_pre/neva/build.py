"""Building NeVA's configuration from a run's: the only place a model is described."""

from __future__ import annotations

import importlib.util
import os
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

from nemo_pre.compat.cpu_backend import INTERLEAVED_CONFIG, TRANSFORMER_CONFIG
from nemo_pre.config.derived import axis_of_frequency, padded_vocab_size, projector_widths
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ModelConfig, ParallelConfig
from nemo_pre.neva.decoder import DecoderConfig, family_options, fused_layer_spec, local_layer_spec
from nemo_pre.neva.fp8 import fp8_options
from nemo_pre.neva.model import VisualNevaConfig
from nemo_pre.neva.projector import ProjectorConfig
from nemo_pre.neva.vision import VisionTowerConfig


def build_neva_config(config: RunConfig, on_gpu: bool, encoder: str | None = None) -> VisualNevaConfig:
    """NeVA's config for a run, whose encoder starts with the weights in the directory ``encoder``, if that is given.

    On a GPU with Transformer Engine the layers are its own, and fused; elsewhere they are Megatron's, unfused.
    """
    fused = _fused(on_gpu)
    language = _language_config(config, fused, on_gpu)
    vision = config.model.vision
    head_width = config.model.language.hidden_size // config.model.language.num_attention_heads
    backend: dict[str, Any] = {} if fused else dict(TRANSFORMER_CONFIG)
    interleaved: dict[str, Any] = dict(INTERLEAVED_CONFIG) if config.parallel.virtual_pipeline else {}
    return VisualNevaConfig(
        language_transformer_config=language,
        vision_transformer_config=VisionTowerConfig(vision, config.seed, stored=stored_tower(config), start=encoder),
        vision_projection_config=build_projector_config(config.model, config.seed, on_gpu),
        mixed_attention=config.model.attention == "mixed",
        packed=config.data.packing,
        labelled_output=config.parallel.labelled_output,
        rope=config.model.rope,
        rope_axes=axis_of_frequency(config.model.rope, config.model.rope_sections, head_width // 2),
        rope_scaling=config.model.language.rope_scaling,
        vision_feature_layer=vision.feature_layer,
        drop_vision_class_token=vision.drop_class_token,
        freeze_language_model=config.optim.freeze_language,
        freeze_vision_model=config.optim.freeze_vision,
        freeze_vision_projection=config.optim.freeze_projector,
        params_dtype=torch.float32,
        pipeline_dtype=torch.float32 if config.precision.name == "fp32" else torch.bfloat16,
        # A work-around for old versions of torch. It would have the first stage wait until anchors are read.
        batch_p2p_sync=False,
        **interleaved,
        **backend,
    )


def stored_tower(config: RunConfig) -> str | None:
    """The file with the weights of a tower whose outputs are read."""
    from nemo_pre.data.features import TOWER

    return None if config.data.features is None else os.path.join(config.data.features, TOWER)


def build_projector_config(model: ModelConfig, seed: int, on_gpu: bool) -> ProjectorConfig:
    inputs, inner, outputs = projector_widths(model)
    # Fused, its GELU would be the tanh approximation: another function than on a CPU and in an export.
    backend: dict[str, Any] = {"bias_activation_fusion": False} if _fused(on_gpu) else dict(TRANSFORMER_CONFIG)
    return ProjectorConfig(
        projector_type=model.projector,
        input_size=inputs,
        hidden_size=outputs,
        ffn_hidden_size=inner,
        seed=seed,
        fused=_fused(on_gpu),
        params_dtype=torch.float32,
        **backend,
    )


def _fused(on_gpu: bool) -> bool:
    return on_gpu and importlib.util.find_spec("transformer_engine") is not None


def _language_config(config: RunConfig, fused: bool, on_gpu: bool) -> DecoderConfig:
    model: ModelConfig = config.model
    language = model.language
    options = {
        **family_options(language.family),
        **_recompute_options(config),
        **fp8_options(config.precision),
        **({} if fused else TRANSFORMER_CONFIG),
    }
    built = DecoderConfig(
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        ffn_hidden_size=language.ffn_hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        seq_length=config.data.sequence_length,
        vocab_size=padded_vocab_size(language.vocab_size),
        rotary_base=language.rotary_base,
        layernorm_epsilon=language.layernorm_epsilon,
        share_embeddings_and_output_weights=language.tie_embeddings,
        init_method_std=language.init_std,
        # Megatron then divides the summed loss by the global number of loss tokens, whatever the layout.
        calculate_per_token_loss=True,
        params_dtype=torch.float32,
        transformer_layer_spec=layer_spec(config, fused, on_gpu),
        **options,
    )
    # Not among the arguments: Megatron would compare it with the pipeline's size, which the config learns later.
    built.pipeline_model_parallel_layout = _uneven_layout(config.parallel)
    return built


def _uneven_layout(layout: ParallelConfig) -> PipelineParallelLayerLayout | None:
    """``parallel.pipeline_layers`` in Megatron's letters: embedding, transformer layers, loss."""
    if layout.pipeline_layers is None:
        return None
    chunks = "|".join("t" * layers for layers in layout.pipeline_layers)
    return PipelineParallelLayerLayout.from_str(f"E{chunks}L", layout.pipeline)


def layer_spec(config: RunConfig, fused: bool, on_gpu: bool) -> Any:
    plain = fused_layer_spec if fused else local_layer_spec
    if config.model.attention == "mixed" or config.data.packing:
        return partial(_mixed_attention_layer_spec, plain=plain, backend=attention_backend(config, on_gpu))
    # Transformer Engine has no attention for float32 under context parallelism.
    if config.parallel.context > 1 and (not fused or config.precision.name == "fp32"):
        return partial(_gathered_attention_layer_spec, plain=plain)
    return plain


def attention_backend(config: RunConfig, on_gpu: bool) -> str:
    """The backend of mixed attention: FlexAttention's kernels on a GPU, the dense mask elsewhere."""
    backend = config.model.attention_backend
    return ("flex" if on_gpu else "dense") if backend == "auto" else backend


def _mixed_attention_layer_spec(config: DecoderConfig, plain: Any, backend: str) -> Any:
    from nemo_pre.neva.mixed_attention import with_mixed_attention

    return with_mixed_attention(plain(config), backend)


def _gathered_attention_layer_spec(config: DecoderConfig, plain: Any) -> Any:
    from nemo_pre.compat.context_attention import with_gathered_attention

    return with_gathered_attention(plain(config))


def _recompute_options(config: RunConfig) -> dict[str, Any]:
    kind = config.parallel.recompute
    if kind == "none":
        return {}
    if kind == "selective":
        return {"recompute_granularity": "selective"}
    return {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": config.parallel.recompute_num_layers,
    }
