"""A rank's memory for parameters, gradients and optimizer state, counted from the config.

Activations, communication buffers and the libraries are not included: the figure is a lower bound, enough to refuse
a run that cannot fit and no promise that the others do.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass

from nemo_pre.config.derived import padded_vocab_size, world_size
from nemo_pre.config.schema import RunConfig
from nemo_pre.launch import uses_gpu

GIB = 1024**3


@dataclass(frozen=True)
class MemoryEstimate:
    """Of the rank that holds most. ``available`` is what such a rank may use at most here; None: unknown."""

    parameters: int  # of the whole model
    rank_parameters: int
    bytes_per_rank: int
    available: int | None
    teacher: bool = False  # LaVer's is among the bytes

    def summary(self) -> str:
        held = "parameters, gradients, teacher and" if self.teacher else "parameters, gradients and"
        return (
            f"{_count(self.parameters)} parameters, {_count(self.rank_parameters)} on the fullest rank: "
            f"{_size(self.bytes_per_rank)} of {held} optimizer state there"
            + (f" of {_size(self.available)}" if self.available else "")
            + " (activations not included)"
        )

    def refuse_if_too_much(self) -> None:
        """Raises: ValueError: the state alone exceeds the memory of a rank."""
        if self.available is not None and self.bytes_per_rank > self.available:
            raise ValueError(
                f"A rank needs {_size(self.bytes_per_rank)} for parameters, gradients and optimizer state and has "
                f"{_size(self.available)}: raise parallel.tensor, pipeline or data, or choose a smaller model."
            )


def estimate_memory(config: RunConfig) -> MemoryEstimate:
    """Count the parameters of every pipeline stage, and the bytes of the fullest."""
    parts = count_parameters(config)
    layout, optim = config.parallel, config.optim
    frozen = {
        "vision": optim.freeze_vision,
        "projector": optim.freeze_projector,
        "decoder": optim.freeze_language,
        "embedding": optim.freeze_language,
        "output": optim.freeze_language,
        "heads": False,
        "laver_head": False,
    }
    sharded = {"decoder", "embedding", "output"}  # by tensor parallelism; the others are replicated
    fullest_parameters, fullest_bytes = 0, 0
    for stage in range(layout.pipeline):
        here = {"decoder": parts["decoder"] / layout.pipeline, "heads": parts["heads"]}
        if stage == 0:
            here |= {name: parts[name] for name in ("vision", "projector", "embedding")}
        if stage == layout.pipeline - 1:
            tied = config.model.language.tie_embeddings and layout.pipeline > 1
            here["output"] = parts["embedding"] if tied else parts["output"]
            here["laver_head"] = parts["laver_head"]
        held = {name: n / (layout.tensor if name in sharded else 1) for name, n in here.items()}
        size = sum(n * _bytes_per_parameter(config, frozen[name]) for name, n in held.items())
        if config.objective.laver.enabled:
            size += (held["decoder"] + held.get("laver_head", 0)) * _bytes_of_teacher(config)
        if size > fullest_bytes:
            fullest_parameters, fullest_bytes = round(sum(held.values())), round(size)
    teacher = config.objective.laver.enabled
    return MemoryEstimate(sum(parts.values()), fullest_parameters, fullest_bytes, _available(config), teacher)


def count_parameters(config: RunConfig) -> dict[str, int]:
    """Parameters of the whole model by part."""
    language, vision, pre = config.model.language, config.model.vision, config.objective.pre
    width, ffn = language.hidden_size, language.ffn_hidden_size
    kv_width = width // language.num_attention_heads * language.num_query_groups
    attention = 2 * width * width + 2 * width * kv_width
    bias = width + 2 * kv_width if language.family == "qwen2" else 0
    embedding = padded_vocab_size(language.vocab_size) * width
    tower_layer = 4 * vision.hidden_size * (vision.hidden_size + 1) + 2 * vision.hidden_size * vision.intermediate_size
    tower_layer += vision.intermediate_size + vision.hidden_size + 4 * vision.hidden_size
    patches = (vision.image_size // vision.patch_size) ** 2
    patch_embedding = (3 * vision.patch_size**2 + patches + 1) * vision.hidden_size
    anchor_width = vision.hidden_size if pre.anchor == "pre_projector" else width  # an external one's is not known
    head_width = max(1, round(width * pre.head_hidden_ratio))
    head = head_width * (width + 1) + anchor_width * (head_width + 1)
    num_heads = len(pre.layers) if pre.layers else 1
    laver = config.objective.laver
    laver_width = laver.head_hidden_width
    return {
        "vision": vision.num_layers * tower_layer + patch_embedding,
        "projector": width * (vision.hidden_size + 1) + width * (width + 1),
        "embedding": embedding,
        "decoder": language.num_layers * (attention + bias + 3 * width * ffn + 2 * width) + width,
        "output": 0 if language.tie_embeddings else embedding,
        "heads": num_heads * head if pre.enabled else 0,
        "laver_head": laver_width * (2 * width + laver_width + 2) if laver.enabled else 0,
    }


def _bytes_of_teacher(config: RunConfig) -> float:
    """A float32 average cut over data- and context-parallel ranks, and the copy that computes, if it stays."""
    resident = config.objective.laver.teacher_memory == "resident"
    weight = 2 if config.precision.name == "bf16" else 4
    return 4 / (config.parallel.data * config.parallel.context) + (weight if resident else 0)


def _bytes_per_parameter(config: RunConfig, frozen: bool) -> float:
    """AdamW with float32 gradients and moments; bf16 adds a float32 master weight."""
    weight = 2 if config.precision.name == "bf16" else 4
    if frozen:
        return weight
    state = 12 if config.precision.name == "bf16" else 8
    replicas = config.parallel.data * config.parallel.context if config.parallel.distributed_optimizer else 1
    return weight + 4 + state / replicas


def _available(config: RunConfig) -> int | None:
    ranks_per_node = world_size(config.parallel) // config.cluster.nodes
    if not uses_gpu(config.platform):
        if config.cluster.name != "local":  # described here, run elsewhere
            return None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // ranks_per_node
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    listing = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    sizes = [int(word) for word in listing if word.isdigit()]  # MiB
    return min(sizes) * 1024**2 if sizes else None


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} B" if number >= 1e9 else f"{number / 1e6:.2f} M"


def _size(number: int) -> str:
    return f"{number / GIB:.1f} GiB" if number >= GIB else f"{number / 1024**2:.0f} MiB"
