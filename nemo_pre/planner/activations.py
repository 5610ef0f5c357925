"""Bytes that autograd keeps from a micro-batch's forward pass to its backward pass, on one rank, and what passes make
beside them for a moment.

``local`` are Megatron's own layers, unfused, as on CPU ranks: counted from what they save, and compared with it in the
tests. (On a GPU they would keep less: its RMSNorm keeps a bf16 input, a CPU's two float32 tensors.) ``fused`` are
Transformer Engine's layers on a GPU: counted from what its sources save, and compared with stand-ins that do the same
(:mod:`nemo_pre.compat.rehearsed_te_layers` cites files and lines). Never measured on a GPU.

Every figure is of one micro-batch and one model chunk. Symbols as in "Reducing Activation Recomputation in Large
Transformer Models" (arXiv 2205.05198), but for grouped queries and SwiGLU.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from nemo_pre.config.derived import fp8_recipe, padded_vocab_size
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
from nemo_pre.planner.parameters import costs, is_fp8_layer, projector_matrices
from nemo_pre.planner.vision import tower_activations


@dataclass
class ChunkActivations:
    """Bytes of one micro-batch on one chunk.

    Attributes:
        kept: from the forward to the backward pass, by part.
        recomputed: what is made again during the backward pass and lives beside the rest.
        freed_before: of ``kept``, what the backward pass has freed before it first recomputes.
        moments: what is under way beside ``kept`` at moments of the backward pass that may be its worst, without what
            the pass has freed by then.
    """

    kept: Counter[str] = field(default_factory=Counter)
    recomputed: int = 0
    freed_before: int = 0
    moments: list[int] = field(default_factory=list)

    @property
    def peak_of_backward(self) -> int:
        """Bytes that autograd keeps beside ``kept`` at the backward pass' worst."""
        return max(self.recomputed - self.freed_before, 0)

    @property
    def most_under_way(self) -> int:
        """Bytes beside ``kept`` at the backward pass' worst, with those that are under way."""
        return max(0, self.peak_of_backward, *self.moments)


def chunk_activations(config: RunConfig, load: Load, chunk: Chunk, fused: bool) -> ChunkActivations:
    """Bytes that one chunk keeps of a micro-batch.

    Args:
        fused: Transformer Engine's layers rather than Megatron's own.
    """
    layer, found = LayerActivations(config, load, fused), ChunkActivations()
    layers = dict(zip(chunk.layers, layers_of(config, load, chunk, fused), strict=True))
    recompute, objectives = config.parallel.recompute, costs(config)
    under_way = max((each.most_under_way for each in layers.values()), default=0)
    if recompute == "full" and layers:
        size = config.parallel.recompute_num_layers
        groups = [chunk.layers[start : start + size] for start in range(0, len(layers), size)]
        found.kept["decoder"] = len(groups) * layer.input + layer.shared_by_recomputed
        found.recomputed = max(
            sum(layers[number].everything for number in group)
            - layer.norm_input_is_checkpoint
            + sum(cost.kept_at_layer(load) * _taps(cost, group) for cost in objectives)
            for group in groups
        )
        for cost in objectives:  # what they compare a layer with waits until the layer is there again
            if _taps(cost, chunk.layers):
                waits = load.on_fullest_rank(load.visual, load.length) * layer.width * layer.bytes
                found.kept[f"{cost.objective.title} heads"] += waits * fused
    else:
        selective = recompute == "selective"
        found.kept["decoder"] = sum(
            each.without_attention if selective else each.everything for each in layers.values()
        )
        if selective:
            found.kept["decoder"] += layer.shared_by_recomputed
            found.recomputed, found.freed_before = layer.recomputed_attention, layer.freed_before_attention
        for cost in objectives:
            if taps := _taps(cost, chunk.layers):
                found.kept[f"{cost.objective.title} heads"] += cost.kept_at_layer(load) * taps
    if chunk.first:
        found.kept += first_chunk_activations(config, load, fused)
        if layer.first_input_is_whole_sequence:
            found.kept["decoder"] += layer.whole_input - layer.input
    elif layer.keeps_its_input:
        found.kept["decoder"] += layer.teacher_message
    freed = 0  # before the layers' backward passes
    if chunk.last:
        output = output_activations(config, load, fused)
        found.kept += output
        freed += sum(output.values())
        found.moments += output_moments(config, load, fused)
    for cost in objectives:
        own = cost.kept(load, chunk)
        found.kept += own
        freed += sum(own.values()) if chunk.last else 0
    found.freed_before += freed
    # What is recomputed ends in the group's output, which Megatron's checkpoint holds until the group's gradients are.
    again = found.recomputed + layer.input if recompute == "full" else 0
    found.moments.append(again + under_way - freed)
    if chunk.first and not config.optim.freeze_language:  # the embedding's gradient comes when the layers are through
        embeddings = load.rows * (load.text_width + load.visual) * layer.width * layer.bytes
        found.moments.append(embedding_weight(config) + embeddings - freed - found.kept["decoder"])
    return found


def layers_of(config: RunConfig, load: Load, chunk: Chunk, fused: bool) -> list[LayerActivations]:
    """Each of the chunk's layers, in FP8 where it is."""
    recipe = fp8_recipe(config.precision)
    plain, in_fp8 = LayerActivations(config, load, fused), LayerActivations(config, load, fused, recipe)
    return [in_fp8 if is_fp8_layer(config, number) else plain for number in chunk.layers]


def embedding_weight(config: RunConfig) -> int:
    """Bytes of a rank's part of the embedding's weight, or of the output layer's."""
    vocabulary = padded_vocab_size(config.model.language.vocab_size) // config.parallel.tensor
    return vocabulary * config.model.language.hidden_size * activation_bytes(config)


def _taps(cost: Cost, layers: range) -> int:
    """How many of these layers, from 0, an objective looks at."""
    return sum(layer - 1 in layers for layer in cost.objective.tapped_layers())


class LayerActivations:
    """Bytes that one decoder layer keeps, in all and piece by piece.

    Args:
        fp8: how FP8 is scaled where the layer multiplies in it (fused layers only).

    Attributes:
        everything: without recomputation.
        without_attention: with the core attention recomputed.
    """

    def __init__(self, config: RunConfig, load: Load, fused: bool, fp8: str | None = None) -> None:
        language, layout = config.model.language, config.parallel
        self.config, self.load, self.fused, self.fp8 = config, load, fused, fp8
        self.width = language.hidden_size
        self.bytes = activation_bytes(config)
        self.head = self.width // language.num_attention_heads
        self.heads = language.num_attention_heads // layout.tensor
        self.groups = language.num_query_groups // layout.tensor
        self.inner = language.ffn_hidden_size // layout.tensor
        self.trained = not config.optim.freeze_language
        self.structured = uses_token_structure(config)

    # --- the pieces -------------------------------------------------------------------------------------------------

    def matrix(self, tokens: int, width: int) -> int:
        """Bytes of what a linear layer keeps of its input ``[tokens, width]`` for its weight's gradient: in FP8 the
        transposed copy, and by blocks a float32 for 128 tokens."""
        if self.fp8 is None:
            return tokens * width * self.bytes
        return tokens * width + (-(-tokens // 128) * width * FLOAT if self.fp8 == "blockwise" else 0)

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
        """Bytes one norm keeps: Transformer Engine's its input, and a float32 a token; torch's on a CPU the input and
        for the weight's gradient the normalised input, in float32."""
        kept, width = (1 + self.trained), self.width
        return self.load.sharded * ((width * self.bytes if self.fused else kept * width * FLOAT) + FLOAT)

    @property
    def norm_output(self) -> int:
        """Bytes a linear layer keeps for its weight's gradient, before the gather of sequence parallelism."""
        return self.matrix(self.load.sharded, self.width) if self.trained else 0

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
    def statistics(self) -> int:
        """Bytes of the float32 that an attention kernel keeps of each query and head."""
        return self.load.tokens * self.heads * FLOAT

    @property
    def rotary(self) -> int:
        """Bytes of cosine and sine for queries and keys; the fused kernel, which knows one sequence of positions for
        all rows, keeps the angles alone, once for all layers."""
        explicit = has_explicit_positions(self.config, self.load)
        rows = self.load.rows if explicit else 1
        return 0 if self.fused and not explicit else 4 * rows * self.load.queries * self.head * self.bytes

    @property
    def gate_and_value(self) -> int:
        return 2 * self.load.tokens * self.inner * self.bytes

    @property
    def activated(self) -> int:
        """Bytes kept of the MLP's last layer's input."""
        return self.matrix(self.load.tokens, self.inner) if self.trained else 0

    @property
    def mlp(self) -> int:
        """Bytes the MLP keeps: gate and value; without fusion also the activated gate and a copy of the value; the
        last layer's input."""
        return self.gate_and_value * (1 if self.fused else 2) + self.activated

    @property
    def projection_input(self) -> int:
        """Bytes kept of what the output projection is given, if attention does not keep that tensor itself. With
        scales of the moment the projection keeps the original, as Megatron wants it (transformer/attention.py:217)."""
        return (self.queries // 2 if self.fp8 == "delayed" else self.queries) if self.trained else 0

    @property
    def scores(self) -> int:
        """Elements of the attention matrix."""
        return self.load.rows * self.heads * self.load.queries * self.load.keys

    @property
    def mask(self) -> int:
        """Elements of the mask that all heads share."""
        return self.load.rows * self.load.queries * self.load.keys

    @property
    def core_attention(self) -> int:
        """Bytes kept between rotary embedding and output projection, whose input is counted here."""
        if self.fused:
            return self._fused_attention
        if self.structured:  # PyTorch's kernel keeps its output, which is the projection's input, and a float mask
            return 2 * self.queries + 2 * self.repeated_keys + self.statistics + self.mask * self.bytes
        if self.load.replicas > 1:  # softmax in float32, then a copy in the values' dtype; a boolean mask
            probabilities = self.scores * (FLOAT + (self.bytes if self.bytes < FLOAT else 0))
            mask = self.load.queries * self.load.keys
            return probabilities + self.queries + 2 * self.repeated_keys + mask + self.projection_input
        keys_and_values = 2 * self.queries if self.heads > self.groups else self.key + self.fused_qkv
        return self.scores * self.bytes + self.queries + keys_and_values + self.projection_input

    @property
    def _fused_attention(self) -> int:
        """Kernels keep queries, keys, values (none of them a view of the projection's output any more), and their own
        output."""
        if self.structured:
            around = 2 * self.queries + self.statistics + self.projection_input
            return around + self._keys_and_values_of_mixed_attention
        if self.bytes == FLOAT:  # no kernel: the attention matrix, a key and a value for each head
            return self.scores * FLOAT + 3 * self.queries + self.projection_input
        copy = self.projection_input if self.fp8 == "delayed" else 0
        return 2 * self.queries + 2 * self.key + self.statistics + copy

    @property
    def _keys_and_values_of_mixed_attention(self) -> int:
        """What its backends keep beside queries and an output that the projection takes in another order, so copied.
        Run by run, values that lie in order are a view of the projection's output. With a dense mask there are a key
        and a value for each head, and torch makes a float mask for every call."""
        alone = self.load.replicas == 1
        if self.config.model.attention_backend == "split":
            return self.all_keys + (self.fused_qkv if alone else self.all_keys)
        if self.config.model.attention_backend == "dense":
            values = self.fused_qkv if alone and self.heads == self.groups else self.repeated_keys
            return self.repeated_keys + values + self.mask * self.bytes
        return 2 * self.all_keys

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
        output = self.projection_input if self.fused else self.queries * (self.trained or self.structured)
        return around + inputs + output

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

    # --- for a moment -----------------------------------------------------------------------------------------------

    @property
    def most_under_way(self) -> int:
        """Bytes beside what is kept at the worst moment of the layer, which is in its MLP's backward pass (the sooner,
        the less has been freed), or where keys and values go from context rank to context rank, in attention."""
        gathers, trained = self.load.shards > 1, self.trained
        hidden, whole, inner = self.input, self.whole_input, self.gate_and_value // 2
        weight = self.inner * self.width * self.bytes * trained
        quantized = 0 if self.fp8 is None else 1  # gradients twice, by rows and by columns: as much as in bf16
        # The last layer's: the hidden states' gradient, whole; its input's; its weight's.
        last = hidden + whole * (gathers or quantized) + inner + weight
        # SwiGLU's: the gradient of its output and of its input; the last layer's input is gone.
        activation = hidden + 3 * inner - self.activated
        # The first layer's: its output's gradient, in the place of what SwiGLU kept; the norm's output gathered again;
        # its gradient, before and after it is cut; the weight's.
        parts = whole * (1 + (gathers and trained)) + hidden * gathers
        first = hidden + 2 * inner * quantized + parts + 2 * weight - self.activated
        return max(last, activation, first, *self._moments_of_the_ring)

    @property
    def _moments_of_the_ring(self) -> list[int]:
        """Bytes beside what is kept in Transformer Engine's attention over context ranks, forward and backward, of the
        last of them; none where it is not taken."""
        ranks = self.load.replicas
        if not self.fused or self.structured or ranks == 1:
            return []
        around = self.mlp + self.norm + self.norm_output  # not made yet; freed
        # Forward: all ranks' keys and values, and an output and statistics of each; the projection's output.
        forward = 2 * ranks * self.key + ranks * (self.queries + self.statistics) + self.fused_qkv
        # Backward: gradients of the hidden states, of the output and, twice, of the queries; keys and values with
        # their gradients, of two ranks; those of this step.
        backward = self.input + 3 * self.queries + 10 * self.key + self.statistics // 2
        return [forward - around, backward - around]


# --- the first chunk ------------------------------------------------------------------------------------------------


def first_chunk_activations(config: RunConfig, load: Load, fused: bool) -> Counter[str]:
    """Bytes that encoder, projector and the indices that lay the sequence out keep."""
    visual = load.rows * load.visual
    indices = 3 * visual * INDEX
    if not config.optim.freeze_language:
        indices += load.rows * (load.text_width + 3 * load.text) * INDEX
    if config.parallel.tensor > 1:
        indices += load.rows * load.text_width
    if load.branch:
        whole_text = load.rows * load.text * 3 * INDEX if load.branch_is_whole else 0
        indices += 3 * visual * INDEX + whole_text + load.rows * load.branch
    if config.parallel.context > 1:
        indices += 4 * INDEX
    size, tiles = activation_bytes(config), load.rows * load.tiles
    return Counter(
        {
            "vision": 0 if config.optim.freeze_vision else tower_activations(config.model.vision, tiles, size, fused),
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


def output_moments(config: RunConfig, load: Load, fused: bool) -> list[int]:
    """Bytes beside what is kept at the worst moments of the output layer and the loss, of their backward passes above
    all: the gradient of the logits, or in the forward pass the logits themselves, beside the float32 ones; then these
    go, and the gradients of hidden states and of the weight come."""
    layer = LayerActivations(config, load, fused)
    logits = load.sample_tokens * (embedding_weight(config) // layer.width)
    whole = load.sample_tokens * layer.width * layer.bytes
    shard = whole // load.shards
    kept = output_activations(config, load, fused)["logits and loss"]
    if (
        layer.bytes == FLOAT
    ):  # they are the float32 ones; Megatron makes their gradient in bf16, and autograd of it theirs
        first = logits + logits // 2
    else:
        first = logits + (0 if layer.trained else shard)
    hidden = whole + (shard if load.shards > 1 else 0)
    first += layer.teacher_message  # the teacher's hidden states, which the branch is compared with
    return [first, logits + hidden + embedding_weight(config) * layer.trained - kept]
