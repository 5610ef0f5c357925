"""Parameters by part, for the whole model and for each rank: the numbers of the built model."""

from __future__ import annotations

import re
from itertools import accumulate

from nemo_pre.config.derived import bf16_layers, fp8_recipe, padded_vocab_size, projector_widths, target_layers
from nemo_pre.config.schema import ParallelConfig, RunConfig
from nemo_pre.config.vision_families import feature_width
from nemo_pre.planner.vision import tower_parameters, unused_parameters

LANGUAGE = ("embedding", "decoder", "output")
Chunks = list[range]  # the decoder layers, from 0, of each model chunk a rank holds, in the order of virtual stages


def chunks_of_stages(config: RunConfig) -> list[Chunks]:
    """Which decoder layers each pipeline stage holds.

    Raises:
        ValueError: the layers cannot be cut as the layout says.
    """
    problem = layers_problem(config)
    if problem is not None:
        raise ValueError(problem)
    layout = config.parallel
    count = num_chunks(layout)
    sizes = layout.pipeline_layers or [config.model.language.num_layers // count] * count
    ends = list(accumulate(sizes))
    chunks = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    return [chunks[stage :: layout.pipeline] for stage in range(layout.pipeline)]


def placed_chunks(config: RunConfig, stage: int) -> list[tuple[range, bool, bool]]:
    """Of every chunk of a stage its layers, and whether it is the pipeline's first and its last."""
    chunks, stages = chunks_of_stages(config)[stage], config.parallel.pipeline
    last = len(chunks) - 1
    return [
        (layers, stage == 0 and index == 0, stage == stages - 1 and index == last)
        for index, layers in enumerate(chunks)
    ]


def num_chunks(layout: ParallelConfig) -> int:
    """Model chunks of a whole pipeline."""
    return layout.pipeline * (layout.virtual_pipeline or 1)


def layers_problem(config: RunConfig) -> str | None:
    """One sentence on why the decoder layers cannot be cut into the pipeline's chunks; None: they can."""
    layout, layers = config.parallel, config.model.language.num_layers
    count, sizes = num_chunks(layout), layout.pipeline_layers
    what = "parallel.pipeline" + (" x parallel.virtual_pipeline" if layout.virtual_pipeline else "")
    if sizes is None and layers % count:
        return (
            f"{what}={count} must divide model.language.num_layers={layers}, or parallel.pipeline_layers name the "
            f"layers of each chunk."
        )
    if sizes is not None and (len(sizes) != count or sum(sizes) != layers or min(sizes) < 1):
        return (
            f"parallel.pipeline_layers={list(sizes)} must be {count} numbers above 0 ({what}) that add up to "
            f"model.language.num_layers={layers}."
        )
    return None


def model_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model by part; ``heads`` and ``laver`` are trained and dropped at inference."""
    language, laver = config.model.language, config.objective.laver
    embedding = padded_vocab_size(language.vocab_size) * language.hidden_size
    return {
        "vision": run_tower_parameters(config),
        "projector": projector_parameters(config),
        "embedding": embedding,
        "decoder": language.num_layers * layer_parameters(config) + language.hidden_size,
        "output": 0 if language.tie_embeddings else embedding,
        "heads": len(target_layers_among(config, range(language.num_layers))) * prediction_head_parameters(config),
        "laver": (laver_head_parameters(config) + _mask_token(config)) if laver.enabled else 0,
    }


def run_tower_parameters(config: RunConfig) -> int:
    """Of the encoder, none where its outputs are read."""
    return 0 if config.data.features else tower_parameters(config.model.vision)


def rank_parameters(config: RunConfig, stage: int) -> dict[str, int]:
    """Parameters of one rank of a pipeline stage by part; tied embeddings lie on the first and the last stage."""
    language, layout, laver = config.model.language, config.parallel, config.objective.laver
    chunks = chunks_of_stages(config)[stage]
    num_layers = sum(map(len, chunks))
    first, last = stage == 0, stage == layout.pipeline - 1
    embedding = padded_vocab_size(language.vocab_size) * language.hidden_size // layout.tensor
    taps = sum(len(target_layers_among(config, layers)) for layers in chunks)
    tied_copy = last and not first and language.tie_embeddings
    return {
        "vision": run_tower_parameters(config) if first else 0,
        "projector": projector_parameters(config) if first else 0,
        "embedding": embedding if first else 0,
        "decoder": num_layers * layer_parameters(config, layout.tensor) + (language.hidden_size if last else 0),
        "output": embedding if last and (tied_copy or not language.tie_embeddings) else 0,
        "heads": taps * prediction_head_parameters(config),
        "laver": (laver_head_parameters(config) * last + _mask_token(config) * first) if laver.enabled else 0,
    }


def trainable_parameters(config: RunConfig, parameters: dict[str, int]) -> dict[str, int]:
    """Of a rank's parameters those that have a gradient."""
    optim = config.optim
    frozen = {
        "vision": optim.freeze_vision,
        "projector": optim.freeze_projector,
        **dict.fromkeys(LANGUAGE, optim.freeze_language),
    }
    trained = {part: 0 if frozen.get(part) else number for part, number in parameters.items()}
    if trained["vision"]:
        trained["vision"] -= unused_parameters(config.model.vision)
    return trained


def layer_parameters(config: RunConfig, tensor: int = 1) -> int:
    """Of a decoder layer on a tensor-parallel rank."""
    language = config.model.language
    width, head = language.hidden_size, language.hidden_size // language.num_attention_heads
    qkv_rows = (language.num_attention_heads + 2 * language.num_query_groups) * head // tensor
    attention = qkv_rows * (width + (language.family == "qwen2")) + width * width // tensor
    return attention + 3 * width * language.ffn_hidden_size // tensor + 2 * width


def projector_parameters(config: RunConfig) -> int:
    return sum(rows * (columns + 1) for columns, rows in projector_matrices(config))


def projector_matrices(config: RunConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the projector's linear layers; Megatron's own projectors are counted as plain ones."""
    inputs, inner, outputs = projector_widths(config.model)
    named = re.fullmatch(r"mlp(\d+)x_gelu", config.model.projector)
    depth = int(named[1]) if named else {"mcore_affine": 1}.get(config.model.projector, 2)
    return [(inputs, inner if depth > 1 else outputs)] + [(inner, outputs)] * (depth - 1)


def prediction_head_matrices(config: RunConfig) -> list[tuple[int, int]]:
    """Of one of PRe's heads. An external anchor's width is not known here: the decoder's is taken."""
    pre, width = config.objective.pre, config.model.language.hidden_size
    hidden = max(1, round(width * pre.head_hidden_ratio))
    output = feature_width(config.model.vision) if pre.anchor == "pre_projector" else width
    return [(width, hidden), (hidden, output)]


def prediction_head_parameters(config: RunConfig) -> int:
    norm = 2 * config.model.language.hidden_size if config.objective.pre.head_norm else 0
    return norm + sum(rows * (columns + 1) for columns, rows in prediction_head_matrices(config))


def laver_head_parameters(config: RunConfig) -> int:
    width, hidden = config.model.language.hidden_size, config.objective.laver.head_hidden_width
    return hidden * (width + 1) + hidden * (hidden + 1) + width * hidden


def _mask_token(config: RunConfig) -> int:
    return config.model.language.hidden_size if config.objective.laver.mask_token == "learned" else 0


def fp8_layers_among(config: RunConfig, layers: range) -> int:
    """How many of these decoder layers, counted from 0, multiply matrices in FP8."""
    if fp8_recipe(config.precision) is None:
        return 0
    ends = bf16_layers(config.precision)
    return len(range(max(layers.start, ends), min(layers.stop, config.model.language.num_layers - ends)))


def target_layers_among(config: RunConfig, layers: range) -> list[int]:
    """PRe's target layers among these, both counted from 0."""
    pre = config.objective.pre
    targets = target_layers(pre, config.model.language.num_layers) if pre.enabled else ()
    return [number - 1 for number in targets if number - 1 in layers]
