"""A rank's memory by kind, for every pipeline stage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.config.derived import fp8_recipe
from nemo_pre.config.run import RunConfig
from nemo_pre.config.vision_families import feature_width
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.activations import ChunkActivations, LayerActivations, chunk_activations
from nemo_pre.planner.chunks import chunks_of_stages
from nemo_pre.planner.load import (
    FLOAT,
    INDEX,
    Load,
    activation_bytes,
    has_explicit_positions,
    uses_token_structure,
)
from nemo_pre.planner.parameters import (
    costs,
    fp8_layers_among,
    layer_matrices,
    rank_parameters,
    trainable_parameters,
)
from nemo_pre.planner.schedule import peak
from nemo_pre.planner.vision import pixels_of_tile

GIB = 1024**3
GPU_LIBRARIES = 3 * GIB  # CUDA's context, NCCL's and cuBLAS' buffers


@dataclass
class RankMemory:
    """Bytes that one rank of a pipeline stage holds.

    Attributes:
        state: weights, gradients, optimizer and what objectives keep, by kind.
        activations: by part, of all micro-batches in flight, and what a backward pass recomputes.
        working: buffers of communication, gradients under way and the libraries, by kind.
        in_flight: micro-batches of each chunk at the peak.
    """

    state: dict[str, int]
    activations: dict[str, int]
    working: dict[str, int] = field(default_factory=dict)
    in_flight: list[int] = field(default_factory=list)

    @property
    def by_kind(self) -> dict[str, int]:
        kinds = {**self.state, **{f"activations, {part}": size for part, size in self.activations.items()}}
        return {kind: size for kind, size in (kinds | self.working).items() if size}

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


def rank_memory(config: RunConfig, load: Load, stage: int, fused: bool) -> RankMemory:
    """Memory of a rank of ``stage``, in bytes.

    Args:
        fused: a GPU's layers (Transformer Engine's), with its libraries' buffers.
    """
    activations, in_flight = rank_activations(config, load, stage, fused)
    return RankMemory(
        state=state_memory(config, stage),
        activations=dict(activations),
        working=working_memory(config, load, stage, fused),
        in_flight=in_flight,
    )


def fullest_rank(config: RunConfig, load: Load, fused: bool) -> tuple[int, RankMemory]:
    """The stage whose ranks hold most, and what they hold."""
    sizes = {stage: rank_memory(config, load, stage, fused) for stage in stages_that_differ(config)}
    stage = max(sizes, key=lambda number: sizes[number].total)
    return stage, sizes[stage]


def stages_that_differ(config: RunConfig) -> list[int]:
    """The first of all stages with the same parts, which has most micro-batches in flight, one for each kind."""
    found: dict[tuple[Any, ...], int] = {}
    last = config.parallel.pipeline - 1
    tapped = [objective.tapped_layers() for objective in enabled(config)]
    for stage, chunks in enumerate(chunks_of_stages(config)):
        parts = [
            (len(chunk.layers), *(sum(layer - 1 in chunk.layers for layer in layers) for layers in tapped))
            for chunk in chunks
        ]
        found.setdefault((*parts, stage == 0, stage == last), stage)
    return sorted(found.values())


# --- state ----------------------------------------------------------------------------------------------------------


def state_memory(config: RunConfig, stage: int) -> dict[str, int]:
    """Bytes that live from step to step, by kind: AdamW with float32 gradients and moments; bf16 adds a float32 master
    weight, cut as the moments are. Behind that what objectives keep."""
    layout, bf16 = config.parallel, config.precision.name != "fp32"
    parameters = rank_parameters(config, stage)
    trained = sum(trainable_parameters(config, parameters).values())
    replicas = layout.data * layout.context
    found = Counter(
        {
            "weights": sum(parameters.values()) * (2 if bf16 else FLOAT),
            "gradients": trained * FLOAT,
            "optimizer": trained * (12 if bf16 else 8) // (replicas if layout.distributed_optimizer else 1),
            "FP8 copies": _fp8_copies(config, stage),
        }
    )
    for cost in costs(config):
        found.update(cost.state(stage, parameters["decoder"]))
    return dict(found)


def _fp8_copies(config: RunConfig, stage: int) -> int:
    """Bytes of the FP8 layers' weights, kept from the step's first micro-batch on, row by row and column by column;
    further copies of the layers, which compute and are not trained, have theirs by rows alone."""
    layers = sum(fp8_layers_among(config, chunk.layers) for chunk in chunks_of_stages(config)[stage])
    weights = layer_matrices(config, config.parallel.tensor)
    by_rows = sum(_fp8_copy(config, *weight) for weight in weights)
    by_columns = sum(_fp8_copy(config, *reversed(weight)) for weight in weights)
    return layers * (by_columns + by_rows * (1 + sum(cost.decoder_copies for cost in costs(config))))


def _fp8_copy(config: RunConfig, lines: int, width: int) -> int:
    """Bytes of a weight's copy: a byte an element, and by blocks a float32 for 128 x 128, in lines of multiples of 4
    (Transformer Engine 2.9.0, ``tensor/float8_blockwise_tensor.py``)."""
    blocks = -(-lines // 128) * (-(-width // 512) * 4) if fp8_recipe(config.precision) == "blockwise" else 0
    return lines * width + blocks * FLOAT


# --- activations ----------------------------------------------------------------------------------------------------


def rank_activations(config: RunConfig, load: Load, stage: int, fused: bool) -> tuple[Counter[str], list[int]]:
    """Bytes of activations of a stage's ranks at the peak of a step, by part, and the micro-batches in flight per
    chunk."""
    chunks = activations_of_chunks(config, load, stage, fused)
    micro_batches = _micro_batches(config, load)
    kept = [sum(chunk.kept.values()) for chunk in chunks]
    extra = [chunk.peak_of_backward for chunk in chunks]
    most, in_flight = peak(stage, config.parallel.pipeline, micro_batches, kept, extra)
    found: Counter[str] = Counter()
    for chunk, number in zip(chunks, in_flight, strict=True):
        found.update({part: size * number for part, size in chunk.kept.items() if size})
    recomputed = round(most) - sum(found.values())
    if recomputed:
        found["recomputed"] = recomputed
    if not (fused or uses_token_structure(config) or config.parallel.context > 1):
        found["mask"] = load.length**2
    elif fused and uses_token_structure(config) and config.model.attention_backend == "dense":
        found["mask"] = (in_flight[0] + 1) * LayerActivations(config, load, fused).mask  # a bool
    return found, in_flight


def _micro_batches(config: RunConfig, load: Load) -> int:
    """Micro-batches of a step."""
    return max(config.trainer.global_batch_size // (load.rows * config.parallel.data), 1)


def activations_of_chunks(config: RunConfig, load: Load, stage: int, fused: bool) -> list[ChunkActivations]:
    return [chunk_activations(config, load, chunk, fused) for chunk in chunks_of_stages(config)[stage]]


# --- the rest -------------------------------------------------------------------------------------------------------


def working_memory(config: RunConfig, load: Load, stage: int, fused: bool) -> dict[str, int]:
    """Bytes that live for a moment at the worst, and that the libraries take, by kind."""
    layer, layout = LayerActivations(config, load, fused), config.parallel
    chunks = activations_of_chunks(config, load, stage, fused)
    kept = [sum(chunk.kept.values()) for chunk in chunks]
    micro_batches = _micro_batches(config, load)
    saved, with_working = (
        peak(stage, layout.pipeline, micro_batches, kept, extra)[0]
        for extra in ([chunk.peak_of_backward for chunk in chunks], [chunk.most_under_way for chunk in chunks])
    )
    message = layer.input + layer.teacher_message if layout.pipeline > 1 else 0
    _, in_flight = rank_activations(config, load, stage, fused)
    ends = zip(chunks_of_stages(config)[stage], in_flight, strict=True)
    # What a chunk has sent stays until its backward pass: taps may look at it, so Megatron is not told to let go of it
    # (deallocate_pipeline_outputs). Interleaving receives one message ahead of its use, each way.
    sent = sum(number for chunk, number in ends if not chunk.last) * message
    messages = (6 if layout.virtual_pipeline else 4) * message
    # Megatron's output layer gathers into memory that stays.
    gathers = load.shards > 1 and stage == layout.pipeline - 1
    gathered = load.sample_tokens * layer.width * layer.bytes if gathers else 0
    return {
        "sent to later stages": sent,
        "communication": messages + gathered,
        "layout": layout_bytes(config, load, max(in_flight), len(chunks)),
        "images": loaded_image_bytes(config, load) if stage == 0 else 0,
        "gradients under way": round(with_working - saved),
        "libraries": GPU_LIBRARIES if fused else 0,
    }


def loaded_image_bytes(config: RunConfig, load: Load) -> int:
    """Bytes of the last micro-batch's images as the loader gives them, in float32, or of their stored features. NeMo
    holds a micro-batch until the next one comes, the backward pass long."""
    vision, tiles, found = config.model.vision, load.rows * load.tiles, 0
    if config.data.features is not None:
        found += tiles * load.tile_tokens * feature_width(vision) * activation_bytes(config)
    if config.data.features is None or any(objective.looks_at_pictures() for objective in enabled(config)):
        found += tiles * pixels_of_tile(vision) * FLOAT
    kept_by_tower = not config.optim.freeze_vision and activation_bytes(config) == FLOAT  # the same tensor
    return 0 if kept_by_tower else found


def layout_bytes(config: RunConfig, load: Load, in_flight: int, chunks: int) -> int:
    """Bytes of micro-batches' tables beside those that autograd keeps: ids and weights of their text, where their text
    and their visual tokens go, labels laid out, the angles of positions, which each chunk makes for itself.

    Args:
        in_flight: micro-batches; the one before is not forgotten yet.
    """
    tokens, text, visual = load.rows * load.keys, load.rows * load.text_width, load.rows * load.visual
    positions = load.rows if has_explicit_positions(config, load) else 1
    head = config.model.language.hidden_size // config.model.language.num_attention_heads
    tables = tokens * (5 * INDEX + 2 * FLOAT) + text * (3 * INDEX + FLOAT) + visual * 3 * INDEX
    tables += tokens * 3 * (INDEX + FLOAT) * uses_token_structure(config)
    return (in_flight + 1) * tables + chunks * positions * load.keys * head * FLOAT
