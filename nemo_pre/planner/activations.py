"""Bytes that autograd keeps from a micro-batch's forward pass to its backward pass, on one rank.

``local`` are Megatron's own layers, unfused, as on CPU ranks: counted from what they save, and compared with it in the
tests. ``fused`` are Transformer Engine's layers with flash attention on a GPU: an estimate from what such kernels need
for their backward pass, never measured.

Every figure is of one micro-batch and one model chunk. Symbols as in "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), but for grouped queries and SwiGLU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nemo_pre.config.derived import padded_vocab_size
from nemo_pre.config.run import RunConfig
from nemo_pre.objectives.cost import Cost
from nemo_pre.planner.chunks import Chunk
from nemo_pre.planner.load import (
    FLOAT,
    INDEX,
    Load,
    activation_bytes,
    has_explicit_positions,
    uses_token_structure,
)
from nemo_pre.planner.parameters import costs, projector_matrices
from nemo_pre.planner.vision import tower_activations


@dataclass
class ChunkActivations:
    """Bytes of one micro-batch on one chunk.

    Attributes:
        kept: from the forward to the backward pass, by part.
        recomputed: what is made again during the backward pass and lives beside the rest.
        freed_before: of ``kept``, what the backward pass has freed before it first recomputes.
    """

    kept: Counter[str] = field(default_factory=Counter)
    recomputed: int = 0
    freed_before: int = 0

    @property
    def peak_of_backward(self) -> int:
        """Bytes that the backward pass adds to ``kept`` at its worst."""
        return max(self.recomputed - self.freed_before, 0)


def chunk_activations(config: RunConfig, load: Load, chunk: Chunk, fused: bool) -> ChunkActivations:
    """Bytes that one chunk keeps of a micro-batch.

    Args:
        fused: Transformer Engine's layers rather than Megatron's own.
    """
    layer, layers = LayerActivations(config, load, fused), chunk.layers
    recompute, found = config.parallel.recompute, ChunkActivations()
    objectives = costs(config)
    if recompute == "full" and len(layers):
        size = config.parallel.recompute_num_layers
        groups = [layers[start : start + size] for start in range(0, len(layers), size)]
        found.kept["decoder"] = len(groups) * layer.input + layer.shared_by_recomputed
        found.recomputed = max(
            len(group) * layer.everything
            - layer.norm_input_is_checkpoint
            + sum(cost.kept_at_layer(load) * _taps(cost, group) for cost in objectives)
            for group in groups
        )
    else:
        selective = recompute == "selective"
        found.kept["decoder"] = len(layers) * (layer.without_attention if selective else layer.everything)
        found.kept["decoder"] += layer.shared_by_recomputed if selective else 0
        found.recomputed = layer.recomputed_attention if selective else 0
        found.freed_before = layer.freed_before_attention if selective else 0
        for cost in objectives:
            if taps := _taps(cost, layers):
                found.kept[f"{cost.objective.title} heads"] += cost.kept_at_layer(load) * taps
    if chunk.first:
        found.kept += first_chunk_activations(config, load, fused)
        if layer.first_input_is_whole_sequence:
            found.kept["decoder"] += layer.whole_input - layer.input
    elif layer.keeps_its_input:
        found.kept["decoder"] += layer.teacher_message
    if chunk.last:
        output = output_activations(config, load, fused)
        found.freed_before += sum(output.values())
        found.kept += output
    for cost in objectives:
        own = cost.kept(load, chunk)
        found.kept += own
        found.freed_before += sum(own.values()) if chunk.last else 0
    return found


def _taps(cost: Cost, layers: range) -> int:
    """How many of these layers, from 0, an objective looks at."""
    return sum(layer - 1 in layers for layer in cost.objective.tapped_layers())


class LayerActivations:
    """Bytes that one decoder layer keeps, in all and piece by piece.

    Attributes:
        everything: without recomputation.
        without_attention: with the core attention recomputed.
    """

    def __init__(self, config: RunConfig, load: Load, fused: bool) -> None:
        language, layout = config.model.language, config.parallel
        self.config, self.load, self.fused = config, load, fused
        self.width = language.hidden_size
        self.bytes = activation_bytes(config)
        self.head = self.width // language.num_attention_heads
        self.heads = language.num_attention_heads // layout.tensor
        self.groups = language.num_query_groups // layout.tensor
        self.inner = language.ffn_hidden_size // layout.tensor
        self.trained = not config.optim.freeze_language
        self.structured = uses_token_structure(config)

    # --- the pieces -------------------------------------------------------------------------------------------------

    @property
    def input(self) -> int:
        """Bytes of the hidden states on this rank."""
        return self.load.sharded * self.width * self.bytes

    @property
    def whole_input(self) -> int:
        """Bytes of the hidden states before sequence parallelism cuts them."""
        return self.load.tokens * self.width * self.bytes

    @property
    def norm(self) -> int:
        """Bytes one norm keeps: the input, and for the weight's gradient the normalised input; float32 but for
        Transformer Engine's."""
        kept, width = (1 + self.trained), self.width
        return self.load.sharded * ((width * self.bytes if self.fused else kept * width * FLOAT) + FLOAT)

    @property
    def norm_output(self) -> int:
        """Bytes a linear layer keeps for its weight's gradient, before the gather of sequence parallelism."""
        return self.input if self.trained else 0

    @property
    def queries(self) -> int:
        return self.load.tokens * self.heads * self.head * self.bytes

    @property
    def fused_qkv(self) -> int:
        """Bytes of the query-key-value projection's output: views of it keep all of it."""
        return self.load.tokens * (self.heads + 2 * self.groups) * self.head * self.bytes

    @property
    def key(self) -> int:
        """Bytes of a rank's own keys, one head per group."""
        return self.load.tokens * self.groups * self.head * self.bytes

    @property
    def all_keys(self) -> int:
        """Bytes of the keys of all context ranks, one head per group."""
        return self.key * self.load.replicas

    @property
    def repeated_keys(self) -> int:
        """Bytes of the keys of all context ranks, one head per query head."""
        return self.queries * self.load.replicas

    @property
    def rotary(self) -> int:
        """Bytes of cosine and sine for queries and keys; fused, only the angles are kept, once."""
        rows = self.load.rows if has_explicit_positions(self.config, self.load) else 1
        return 0 if self.fused else 4 * rows * self.load.queries * self.head * self.bytes

    @property
    def mlp(self) -> int:
        """Bytes the MLP keeps: gate and value; without fusion also the activated gate and a copy of the value; the
        last layer's input."""
        per_token = 2 + (0 if self.fused else 2) + self.trained
        return self.load.tokens * self.inner * per_token * self.bytes

    @property
    def projection_input(self) -> int:
        return self.queries if self.trained else 0

    @property
    def scores(self) -> int:
        """Elements of the attention matrix."""
        return self.load.rows * self.heads * self.load.queries * self.load.keys

    @property
    def core_attention(self) -> int:
        """Bytes kept between rotary embedding and output projection, whose input is counted here."""
        statistics = self.load.tokens * self.heads * FLOAT
        if self.fused:
            gathered = 2 * self.all_keys if self.structured and self.load.replicas > 1 else 0
            return self.queries + self.key + self.fused_qkv + gathered + self.queries + statistics
        if self.structured:  # PyTorch's kernel keeps its output, which is the projection's input, and a float mask
            mask = self.load.rows * self.load.queries * self.load.keys * self.bytes
            return 2 * self.queries + 2 * self.repeated_keys + statistics + mask
        if self.load.replicas > 1:  # softmax in float32, then a copy in the values' dtype; a boolean mask
            probabilities = self.scores * (FLOAT + (self.bytes if self.bytes < FLOAT else 0))
            mask = self.load.queries * self.load.keys
            return probabilities + self.queries + 2 * self.repeated_keys + mask + self.projection_input
        keys_and_values = 2 * self.queries if self.heads > self.groups else self.key + self.fused_qkv
        return self.scores * self.bytes + self.queries + keys_and_values + self.projection_input

    # --- together ---------------------------------------------------------------------------------------------------

    @property
    def everything(self) -> int:
        around = 2 * (self.norm + self.norm_output) + self.rotary + self.mlp
        return around + self.core_attention

    @property
    def without_attention(self) -> int:
        """Bytes the layer keeps with Megatron's ``core_attn`` recomputation: queries, keys and values instead of what
        attention keeps."""
        around = 2 * (self.norm + self.norm_output) + self.rotary + self.mlp
        inputs = self.queries + self.key + self.fused_qkv + FLOAT  # and the mask's kind, an int32
        return around + inputs + (self.queries if self.trained or self.structured else 0)

    @property
    def recomputed_attention(self) -> int:
        return self.core_attention - self.queries

    @property
    def freed_before_attention(self) -> int:
        return self.mlp + self.norm + self.norm_output + self.projection_input

    @property
    def shared_by_recomputed(self) -> int:
        """Bytes that all recomputed layers of a micro-batch are given beside hidden states: angles, token
        structure."""
        rows = self.load.rows if has_explicit_positions(self.config, self.load) else 1
        angles = rows * self.load.queries * self.head * FLOAT
        structure = self.load.rows * self.load.keys * 3 * FLOAT if self.structured else 0
        return (angles if self.config.parallel.recompute == "full" else 0) + structure

    @property
    def norm_input_is_checkpoint(self) -> int:
        """Bytes of the checkpoint that the recomputed group's first norm keeps itself, if it needs no float32 copy."""
        return self.input if self.bytes == FLOAT or self.fused else 0

    @property
    def keeps_its_input(self) -> bool:
        """Whether the first layer keeps what it was given, rather than a copy in float32."""
        return self.bytes == FLOAT or self.fused or self.config.parallel.recompute == "full"

    @property
    def first_input_is_whole_sequence(self) -> bool:
        """Whether the first layer keeps all embeddings: sequence parallelism's part is a view of them, unless a branch
        joins two parts."""
        return self.load.shards > 1 and not self.load.branch and self.keeps_its_input

    @property
    def teacher_message(self) -> int:
        """Bytes of the teacher's branch, which comes with the student's hidden states from the former stage in one
        tensor."""
        return self.load.rows * self.load.branch // self.load.replicas // self.load.shards * self.width * self.bytes


# --- the first chunk ------------------------------------------------------------------------------------------------


def first_chunk_activations(config: RunConfig, load: Load, fused: bool) -> Counter[str]:
    """Bytes that encoder, projector and the indices that lay the sequence out keep."""
    visual = load.rows * load.visual
    indices = load.rows * load.text * (0 if config.optim.freeze_language else 1 + 3) * INDEX + 3 * visual * INDEX
    if config.parallel.tensor > 1:
        indices += load.rows * load.text
    if load.branch:
        whole_text = load.rows * load.text * 3 * INDEX if load.branch_is_whole else 0
        indices += 3 * visual * INDEX + whole_text + load.rows * load.branch
    if config.parallel.context > 1:
        indices += 4 * INDEX
    size, tiles = activation_bytes(config), load.rows * load.tiles
    return Counter(
        {
            "vision": 0 if config.optim.freeze_vision else tower_activations(config.model.vision, tiles, size),
            "projector": projector_activations(config, load),
            "embedding": indices,
        }
    )


def projector_activations(config: RunConfig, load: Load) -> int:
    """Bytes of the inputs of the projector's linear layers and of the GELUs between them."""
    size = activation_bytes(config)
    tokens, matrices = load.rows * load.tiles * load.tile_tokens, projector_matrices(config)
    trained = not config.optim.freeze_projector
    if not trained and config.optim.freeze_vision:
        return 0
    inputs = sum(columns for columns, _ in matrices) if trained else 0
    return tokens * (inputs + sum(columns for columns, _ in matrices[1:])) * size


# --- the last chunk -------------------------------------------------------------------------------------------------


def output_activations(config: RunConfig, load: Load, fused: bool) -> Counter[str]:
    """Bytes that the last norm, the logits and the loss keep."""
    layer = LayerActivations(config, load, fused)
    vocabulary = padded_vocab_size(config.model.language.vocab_size) // config.parallel.tensor
    loss = load.sample_tokens * (INDEX + FLOAT + 1)  # masked labels, loss mask, whether a label lies on this rank
    logits = load.sample_tokens * vocabulary * FLOAT
    return Counter({"logits and loss": logits + loss, "decoder": layer.norm + layer.norm_output})
