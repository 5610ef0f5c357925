"""Parameters by part, for the whole model and for each rank: the numbers of the built model."""

from __future__ import annotations

import re

from nemo_pre.config.derived import bf16_layers, fp8_recipe, padded_vocab_size, projector_widths
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.cost import Cost
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.chunks import Chunk, chunks_of_stages
from nemo_pre.planner.vision import tower_parameters, unused_parameters

LANGUAGE = ("embedding", "decoder", "output")


def model_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model by part; those named after an objective are trained and dropped at inference."""
    language = config.model.language
    embedding = padded_vocab_size(language.vocab_size) * language.hidden_size
    return {
        "vision": run_tower_parameters(config),
        "projector": projector_parameters(config),
        "embedding": embedding,
        "decoder": language.num_layers * layer_parameters(config) + language.hidden_size,
        "output": 0 if language.tie_embeddings else embedding,
        **objective_parameters(config, [Chunk(range(language.num_layers), first=True, last=True)]),
    }


def objective_parameters(config: RunConfig, chunks: list[Chunk]) -> dict[str, int]:
    """Number of parameters that each counted objective trains on these chunks, by the objective's name."""
    return {cost.objective.name: sum(cost.parameters(chunk) for chunk in chunks) for cost in costs(config)}


def costs(config: RunConfig) -> list[Cost]:
    """The enabled objectives' costs; :func:`not_counted` names the objectives that have none."""
    return [cost for objective in enabled(config) if (cost := objective.build_cost()) is not None]


def not_counted(config: RunConfig) -> list[str]:
    """What a plan leaves out of enabled objectives, as one sentence each."""
    none = [objective.name for objective in enabled(config) if objective.build_cost() is None]
    return [
        *(f"The plan does not count objective.{name}: it names no cost." for name in none),
        *(sentence for cost in costs(config) for sentence in cost.uncounted()),
    ]


def run_tower_parameters(config: RunConfig) -> int:
    """Parameters of the encoder, none where its outputs are read."""
    return 0 if config.data.features else tower_parameters(config.model.vision)


def rank_parameters(config: RunConfig, stage: int) -> dict[str, int]:
    """Parameters of one rank of a pipeline stage by part; tied embeddings lie on the first and the last stage."""
    language, layout = config.model.language, config.parallel
    chunks = chunks_of_stages(config)[stage]
    num_layers = sum(len(chunk.layers) for chunk in chunks)
    first, last = stage == 0, stage == layout.pipeline - 1
    embedding = padded_vocab_size(language.vocab_size) * language.hidden_size // layout.tensor
    tied_copy = last and not first and language.tie_embeddings
    return {
        "vision": run_tower_parameters(config) if first else 0,
        "projector": projector_parameters(config) if first else 0,
        "embedding": embedding if first else 0,
        "decoder": num_layers * layer_parameters(config, layout.tensor) + (language.hidden_size if last else 0),
        "output": embedding if last and (tied_copy or not language.tie_embeddings) else 0,
        **objective_parameters(config, chunks),
    }


def trainable_parameters(config: RunConfig, parameters: dict[str, int]) -> dict[str, int]:
    """Parameters of a rank that have a gradient, by part."""
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
    """Number of parameters of a decoder layer on a tensor-parallel rank."""
    language, matrices = config.model.language, layer_matrices(config, tensor)
    qkv_rows, width = matrices[0]
    biases = qkv_rows if language.family == "qwen2" else 0
    return sum(rows * columns for rows, columns in matrices) + biases + 2 * width


def layer_matrices(config: RunConfig, tensor: int = 1) -> list[tuple[int, int]]:
    """Rows and columns of the weights of a decoder layer's linear layers on a tensor-parallel rank."""
    language = config.model.language
    width, head = language.hidden_size, language.hidden_size // language.num_attention_heads
    qkv_rows = (language.num_attention_heads + 2 * language.num_query_groups) * head // tensor
    inner = language.ffn_hidden_size // tensor
    return [(qkv_rows, width), (width, width // tensor), (2 * inner, width), (width, inner)]


def projector_parameters(config: RunConfig) -> int:
    return sum(rows * (columns + 1) for columns, rows in projector_matrices(config))


def projector_matrices(config: RunConfig) -> list[tuple[int, int]]:
    """Inputs and outputs of the projector's linear layers; Megatron's own projectors are counted as plain ones."""
    inputs, inner, outputs = projector_widths(config.model)
    named = re.fullmatch(r"mlp(\d+)x_gelu", config.model.projector)
    depth = int(named[1]) if named else {"mcore_affine": 1}.get(config.model.projector, 2)
    return [(inputs, inner if depth > 1 else outputs)] + [(inner, outputs)] * (depth - 1)


def is_fp8_layer(config: RunConfig, layer: int) -> bool:
    """Whether this decoder layer, counted from 0, multiplies matrices in FP8."""
    ends = bf16_layers(config.precision)
    return fp8_recipe(config.precision) is not None and ends <= layer < config.model.language.num_layers - ends


def fp8_layers_among(config: RunConfig, layers: range) -> int:
    """How many of these decoder layers, counted from 0, multiply matrices in FP8."""
    return sum(is_fp8_layer(config, layer) for layer in layers)
