"""Every field of the ``config.json`` of the models that are imported, as transformers 4 and 5 and the hub spell them.

A default is what ``transformers`` takes for a field that is left out: it writes the parts of a whole model without the
values that are its own.
"""

from __future__ import annotations

from nemo_pre.huggingface.config_fields import (
    COUNT,
    FLAG,
    FULL_ATTENTION,
    INDEX,
    INDICES,
    LAYER,
    OBJECT,
    POSITIVE,
    REQUIRED,
    WORD,
    Field,
    Irrelevant,
    Only,
    Read,
    Table,
    one_of,
)

_PROVENANCE = Irrelevant("says where the file is from and which code reads it")
_STORAGE = Irrelevant("says how weights are stored, which the files themselves say")
_GENERATION = Irrelevant("says how answers are drawn, which is for the one who asks")
_RUNNING = Irrelevant("says how the same is computed, or what else is returned")
_TRAINING = Irrelevant("says how initial weights were drawn, which the files replace")
_LABELS = Irrelevant("is of classifiers")
_TOKENS = Irrelevant("names tokens, which the tokenizer names too")


def _same(field: Field, *names: str) -> dict[str, Field]:
    return dict.fromkeys(names, field)


# What any model of transformers may have.
_COMMON: dict[str, Field] = {
    **_same(
        _PROVENANCE,
        *("architectures", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "_commit_hash"),
        *("finetuning_task", "tokenizer_class", "unsloth_version", "unsloth_fixed", "transformers.js_config"),
        *("base_config_key", "task_specific_params"),
    ),
    **_same(_STORAGE, "torch_dtype", "dtype"),
    **_same(
        _GENERATION,
        *("max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups"),
        *("diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
        *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id"),
        *("remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"),
        *("max_new_tokens", "generation_config"),
    ),
    **_same(
        _RUNNING,
        *("return_dict", "output_hidden_states", "output_attentions", "torchscript", "use_bfloat16", "use_cache"),
        *("tf_legacy_loss", "chunk_size_feed_forward", "_attn_implementation", "attn_implementation"),
        *("_attn_implementation_autoset", "_attn_implementation_internal", "_output_attentions"),
        *("_experts_implementation", "experts_implementation", "use_flash_attn"),
    ),
    **_same(_TRAINING, "initializer_range", "initializer_factor"),
    **_same(_LABELS, "id2label", "label2id", "problem_type", "num_labels"),
    **_same(_TOKENS, "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "prefix"),
    **_same(_TOKENS, "decoder_start_token_id"),
    **_same(Only(False), "is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"),
    **_same(Only(None, also=(False, {})), "quantization_config", "compression_config", "adapter_config"),
    "is_decoder": Irrelevant("is of encoders with decoders"),
    "cross_attention_hidden_size": Irrelevant("is of encoders with decoders"),
    "pruned_heads": Only({}),
}
_NO_DROPOUT = Only(0.0)
_ROPE_TABLES: dict[str, Field] = {
    "rope_theta": Read(POSITIVE.or_null, None),
    "rope_scaling": Read(OBJECT.or_null, None),
    "rope_parameters": Read(OBJECT.or_null, None),
}
# What other decoders than a Llama and a Qwen2 do; a file that names it all the same may say only that it does not.
_NOT_OURS: dict[str, Field] = {
    **_same(Only(None), "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "clip_qkv"),
    **_same(Only(None), "attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"),
    **_same(Only(False, also=(None,)), "use_qk_norm", "qk_layernorm", "use_sliding_window", "use_mrope"),
    **_same(Only(1.0, also=(None,)), "partial_rotary_factor"),
    "is_causal": Only(True, also=(None,)),
}


def _text(
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    groups: int | None,
    positions: int,
    epsilon: float,
) -> dict[str, Field]:
    """A decoder, with what its class in ``transformers`` takes for what is left out."""
    return {
        **_COMMON,
        **_NOT_OURS,
        **_ROPE_TABLES,
        "model_type": Read(WORD, None),
        "vocab_size": Read(COUNT, vocab_size),
        "hidden_size": Read(COUNT, hidden_size),
        "intermediate_size": Read(COUNT, intermediate_size),
        "num_hidden_layers": Read(COUNT, layers),
        "num_attention_heads": Read(COUNT, heads),
        "num_key_value_heads": Read(COUNT.or_null, groups),
        "head_dim": Read(COUNT.or_null, None),
        "max_position_embeddings": Read(COUNT, positions),
        "rms_norm_eps": Read(POSITIVE, epsilon),
        "tie_word_embeddings": Read(FLAG.or_null, None),
        "layer_types": Read(FULL_ATTENTION.or_null, None),
        "hidden_act": Only("silu"),
        "attention_bias": Only(False),
        "mlp_bias": Only(False),
        "attention_dropout": _NO_DROPOUT,
        "pretraining_tp": Irrelevant("cuts matrices into parts whose results are the whole's"),
        "max_sequence_length": Irrelevant("is the length of the texts it was trained on"),
    }


LLAMA: Table = {**_text(32000, 4096, 11008, 32, 32, None, 2048, 1e-6), "sliding_window": Only(None)}
_WINDOWS = _same(Irrelevant("has no effect without use_sliding_window"), "sliding_window", "max_window_layers")
QWEN2: Table = {
    **_text(151936, 4096, 22016, 32, 32, 32, 32768, 1e-6),
    **_WINDOWS,
    "attention_bias": Irrelevant("is not asked for: a Qwen2 has a bias on query, key and value"),
}
QWEN_VL_TEXT: Table = {
    **_text(152064, 8192, 29568, 80, 64, 8, 32768, 1e-5),
    **_WINDOWS,
    **_same(_TOKENS, "image_token_id", "video_token_id", "vision_token_id"),
    **_same(_TOKENS, "vision_start_token_id", "vision_end_token_id"),
    "attention_bias": QWEN2["attention_bias"],
}


def _tower(width: int, layers: int, heads: int, image_size: int, patch_size: int) -> dict[str, Field]:
    """A vision tower of fixed resolution, likewise."""
    return {
        **_COMMON,
        "model_type": Read(WORD, None),
        "hidden_size": Read(COUNT, width),
        "num_hidden_layers": Read(COUNT, layers),
        "num_attention_heads": Read(COUNT, heads),
        "image_size": Read(COUNT, image_size),
        "patch_size": Read(COUNT, patch_size),
        "num_channels": Only(3),
        "attention_dropout": _NO_DROPOUT,
        "projection_dim": Irrelevant("is the width of the projection behind the tower, which no features come from"),
        "tie_word_embeddings": Irrelevant("is of text"),
    }


CLIP: Table = {
    **_tower(768, 12, 12, 224, 32),
    "intermediate_size": Read(COUNT, 3072),
    "hidden_act": Only("quick_gelu"),
    "layer_norm_eps": Only(1e-5),
    "dropout": _NO_DROPOUT,
}
SIGLIP: Table = {
    **_tower(768, 12, 12, 224, 16),
    "intermediate_size": Read(COUNT, 3072),
    "hidden_act": Only("gelu_pytorch_tanh"),
    "layer_norm_eps": Only(1e-6),
    "vision_use_head": Read(FLAG, True),
}
DINOV2: Table = {
    **_tower(768, 12, 12, 224, 14),
    "mlp_ratio": Read(POSITIVE, 4),
    "hidden_act": Only("gelu"),
    "layer_norm_eps": Only(1e-6),
    "qkv_bias": Only(True),
    "use_swiglu_ffn": Only(False),
    "use_mask_token": Only(True),
    **_same(_NO_DROPOUT, "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    "layerscale_value": _TRAINING,
    **_same(
        Irrelevant("is of a backbone, whose features are taken in another way"),
        *("apply_layernorm", "reshape_hidden_states", "out_features", "out_indices", "stage_names"),
        *("_out_features", "_out_indices"),
    ),
}
AIMV2: Table = {
    **_tower(1024, 24, 8, 224, 14),
    "intermediate_size": Read(COUNT, 2816),
    "is_native": Read(FLAG, False),
    "hidden_act": Only("silu"),
    "rms_norm_eps": Only(1e-5),
    "qkv_bias": Only(False),
    "mlp_bias": Only(False),
    "use_head": Irrelevant("is of the head, which no features come from"),
    # Of our exported models with native resolution.
    "feature_layer": Read(LAYER, -2),
    "spatial_merge_size": Only(1),
    "out_hidden_size": Irrelevant("is the width of the language model"),
}
PATCH_MLP: Table = {
    **_COMMON,
    "model_type": Read(WORD, None),
    "image_size": Read(COUNT, 384),
    "patch_size": Read(COUNT, 16),
    "intermediate_size": Read(COUNT, 1024),
    "hidden_size": Read(COUNT, 1024),
    "tie_word_embeddings": Irrelevant("is of text"),
}
QWEN_VL_TOWER: Table = {
    **_COMMON,
    "model_type": Read(WORD, None),
    "depth": Read(COUNT, 32),
    "hidden_size": Read(COUNT, 3584),
    "intermediate_size": Read(COUNT, 3420),
    "num_heads": Read(COUNT, 16),
    "patch_size": Read(COUNT, 14),
    "window_size": Read(COUNT, 112),
    "fullatt_block_indexes": Read(INDICES, [7, 15, 23, 31]),
    "hidden_act": Only("silu"),
    "in_channels": Only(3),
    "in_chans": Only(3),
    "spatial_merge_size": Only(2),
    "temporal_patch_size": Only(2),
    "rope_parameters": Only({"rope_theta": 10000.0, "rope_type": "axial"}, also=(None,)),
    "out_hidden_size": Irrelevant("is the width of the language model, which the merger's weights show"),
    "spatial_patch_size": Irrelevant("repeats patch_size"),
    "tokens_per_second": Irrelevant("is of videos"),
    "tie_word_embeddings": Irrelevant("is of text"),
}
TOWERS: dict[str, Table] = {
    "clip": CLIP,
    "siglip": SIGLIP,
    "dinov2": DINOV2,
    "aimv2": AIMV2,
    "patch_mlp": PATCH_MLP,
    "qwen25_vl": QWEN_VL_TOWER,
}
# A CLIP or SigLIP whose vision tower alone is read.
_OTHER_HALF = Irrelevant("is of the text tower, or of the comparison with it")
WHOLE_TOWER: Table = {
    **_COMMON,
    "model_type": Read(WORD, None),
    "vision_config": Read(OBJECT, REQUIRED),
    "vision_config_dict": Read(OBJECT.or_null, None),
    **_same(_OTHER_HALF, "text_config", "text_config_dict", "logit_scale_init_value", "projection_dim"),
    **_same(_OTHER_HALF, "tie_word_embeddings", "hidden_size"),
}
_SPATIAL: dict[str, Field] = {
    "visual_attention": Read(one_of("causal", "mixed"), "causal"),
    "visual_rope": Read(one_of("1d", "2d", "mrope"), "1d"),
    "rope_axes": Read(INDICES.or_null, None),
}
LLAVA: Table = {
    **_COMMON,
    "model_type": Read(WORD, REQUIRED),
    "text_config": Read(OBJECT, REQUIRED),
    "vision_config": Read(OBJECT, REQUIRED),
    "image_token_index": Read(INDEX, None),
    "image_token_id": Read(INDEX, None),
    "vision_feature_layer": Read(LAYER, -2),
    "vision_feature_select_strategy": Read(one_of("default", "full"), "default"),
    "tie_word_embeddings": Read(FLAG.or_null, None),
    "projector_hidden_act": Only("gelu"),
    "multimodal_projector_bias": Only(True),
    "ignore_index": Irrelevant("is of losses"),
    "vocab_size": Irrelevant("repeats the text model's"),
    "image_seq_length": Irrelevant("follows from the tower"),
}
SPATIAL_LLAVA: Table = {
    **LLAVA,
    **_SPATIAL,
    "tile_grid": Read(INDICES, REQUIRED),
    "image_seq_length": Read(COUNT, 576),
}
_QWEN_VL_OWN: dict[str, Field] = {
    "model_type": Read(WORD, REQUIRED),
    "text_config": Read(OBJECT, None),
    "vision_config": Read(OBJECT, REQUIRED),
    "image_token_id": Read(INDEX, REQUIRED),
    **_same(Read(INDEX.or_null, None), "vision_start_token_id", "vision_end_token_id"),
    **_same(Irrelevant("is of videos, or of no use"), "video_token_id", "vision_token_id"),
    "tie_word_embeddings": Read(FLAG.or_null, None),
}
# Files on the hub have the text model's values beside the tower's.
QWEN_VL_FLAT: Table = {**QWEN_VL_TEXT, **_QWEN_VL_OWN}
SPATIAL_QWEN_VL_FLAT: Table = {**QWEN_VL_FLAT, **_SPATIAL}
