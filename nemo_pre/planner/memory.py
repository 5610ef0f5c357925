"""A rank's memory by kind, for every pipeline stage."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from nemo_pre.config.derived import padded_vocab_size
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.registry import enabled
from nemo_pre.planner.activations import ChunkActivations, LayerActivations, chunk_activations
from nemo_pre.planner.chunks import chunks_of_stages
from nemo_pre.planner.load import FLOAT, Load, uses_token_structure
from nemo_pre.planner.parameters import (
    costs,
    fp8_layers_among,
    layer_parameters,
    rank_parameters,
    trainable_parameters,
)
from nemo_pre.planner.schedule import peak

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
    further copies of the layers that compute have theirs."""
    layers = sum(fp8_layers_among(config, chunk.layers) for chunk in chunks_of_stages(config)[stage])
    copies = 2 * (1 + sum(cost.decoder_copies for cost in costs(config)))
    return copies * layers * layer_parameters(config, config.parallel.tensor)


# --- activations ----------------------------------------------------------------------------------------------------


def rank_activations(config: RunConfig, load: Load, stage: int, fused: bool) -> tuple[Counter[str], list[int]]:
    """Bytes of activations of a stage's ranks at the peak of a step, by part, and the micro-batches in flight per
    chunk."""
    chunks = activations_of_chunks(config, load, stage, fused)
    micro_batches = max(config.trainer.global_batch_size // (load.rows * config.parallel.data), 1)
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
        found["causal mask"] = load.length**2
    return found, in_flight


def activations_of_chunks(config: RunConfig, load: Load, stage: int, fused: bool) -> list[ChunkActivations]:
    return [chunk_activations(config, load, chunk, fused) for chunk in chunks_of_stages(config)[stage]]


# --- the rest -------------------------------------------------------------------------------------------------------


def working_memory(config: RunConfig, load: Load, stage: int, fused: bool) -> dict[str, int]:
    """Estimated bytes that live for a moment at the worst, and that the libraries take, by kind."""
    layer, layout = LayerActivations(config, load, fused), config.parallel
    messages = 4 * (layer.input + layer.teacher_message) if layout.pipeline > 1 else 0
    gathered = 2 * layer.whole_input if load.shards > 1 else 0
    last = stage == layout.pipeline - 1
    vocabulary = padded_vocab_size(config.model.language.vocab_size) // layout.tensor
    logits = load.sample_tokens * vocabulary * layer.bytes * last
    gate_and_value = 2 * load.tokens * layer.inner * layer.bytes
    weight = vocabulary * layer.width * layer.bytes * (0 if config.optim.freeze_language else 1)
    return {
        "communication": messages + gathered,
        "gradients under way": max(logits, gate_and_value + 2 * layer.whole_input) + weight,
        "libraries": GPU_LIBRARIES if fused else 0,
    }
