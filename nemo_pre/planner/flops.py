"""Floating-point operations of matrix products, by part, for one micro-batch on one rank.

A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n``; backward, one such product for the input's gradient and one for
the weight's. Everything else (norms, softmax, activations) is left out, as :mod:`torch.utils.flop_counter` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.config.derived import padded_vocab_size
from nemo_pre.config.run import RunConfig
from nemo_pre.config.schema import ParallelConfig
from nemo_pre.planner.chunks import Chunk, chunks_of_stages
from nemo_pre.planner.load import Load
from nemo_pre.planner.parameters import costs, projector_matrices
from nemo_pre.planner.vision import tower_flops


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of a forward pass, and of the backward pass with what it recomputes."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def chunk_flops(config: RunConfig, load: Load, chunk: Chunk, dense: bool) -> dict[str, Flops]:
    """FLOPs of one chunk on one tensor-parallel rank, by part.

    Args:
        dense: attention computes every pair of tokens and masks it afterwards, as on CPU ranks; else only pairs that
            see each other count.
    """
    found = {
        "decoder matrices": _decoder_matrices(config, load) * len(chunk.layers),
        "decoder attention": _decoder_attention(config, load, dense) * len(chunk.layers),
    }
    if chunk.first:
        found |= {"vision": _vision(config, load), "projector": _projector(config, load)}
    if chunk.last:
        found["logits"] = _logits(config, load)
    for cost in costs(config):
        found |= cost.flops(load, chunk, dense)
    return found


def stage_flops(config: RunConfig, load: Load, stage: int, dense: bool) -> list[dict[str, Flops]]:
    """FLOPs of every chunk of a pipeline stage, by part."""
    return [chunk_flops(config, load, chunk, dense) for chunk in chunks_of_stages(config)[stage]]


def model_flops(config: RunConfig, load: Load, dense: bool = False) -> dict[str, float]:
    """FLOPs of a whole step's global batch by part, as if on one rank: without what layouts repeat or recompute."""
    from dataclasses import replace

    alone = replace(config, parallel=ParallelConfig())
    whole = Chunk(range(config.model.language.num_layers), first=True, last=True)
    parts = chunk_flops(alone, replace(load, replicas=1, shards=1), whole, dense)
    micro_batches = config.trainer.global_batch_size / load.rows
    return {part: flops.total * micro_batches for part, flops in parts.items() if flops.total}


def visible_pairs(config: RunConfig, load: Load, samples: bool, branch: bool) -> float:
    """Number of pairs of tokens of a row that see each other; within an image both ways with mixed attention."""
    mixed = config.model.attention == "mixed"
    per_image = load.visual / max(load.images, 1)
    both_ways = load.images * per_image * (per_image - 1) / 2 if mixed else 0.0
    pairs = 0.0
    if samples:
        rows = load.images if config.data.packing else 1  # packed samples do not see each other; taken to be equal
        length = load.length / rows
        pairs += rows * length * (length + 1) / 2 + both_ways
    if branch and load.branch_is_whole:
        pairs += load.branch * (load.branch + 1) / 2 + both_ways
    elif branch:
        pairs += load.images * per_image**2
    return pairs


# --- the decoder ----------------------------------------------------------------------------------------------------


def _decoder_matrices(config: RunConfig, load: Load) -> Flops:
    forward = 2.0 * load.tokens * layer_matrices(config)
    recomputed = forward if config.parallel.recompute == "full" else 0.0
    return Flops(forward, forward * (1 if config.optim.freeze_language else 2) + recomputed)


def layer_matrices(config: RunConfig) -> float:
    """Elements of a decoder layer's matrices on a tensor-parallel rank."""
    language = config.model.language
    width = language.hidden_size
    key_width = width // language.num_attention_heads * language.num_query_groups
    return (2 * width * width + 2 * width * key_width + 3 * width * language.ffn_hidden_size) / config.parallel.tensor


def _decoder_attention(config: RunConfig, load: Load, dense: bool) -> Flops:
    pairs = float(load.keys**2) if dense else visible_pairs(config, load, samples=True, branch=load.branch > 0)
    forward = attention_flops(config, load, pairs)
    recomputed = 0.0 if config.parallel.recompute == "none" else forward
    return Flops(forward, 2 * forward + recomputed)


def attention_flops(config: RunConfig, load: Load, pairs: float) -> float:
    """FLOPs of scores and weighted sums: 4 x head width per head and pair."""
    return 4.0 * load.rows * pairs * config.model.language.hidden_size / config.parallel.tensor / load.replicas


def _logits(config: RunConfig, load: Load) -> Flops:
    vocabulary = padded_vocab_size(config.model.language.vocab_size) / config.parallel.tensor
    forward = 2.0 * load.sample_tokens * vocabulary * config.model.language.hidden_size
    return Flops(forward, forward * (1 if config.optim.freeze_language else 2))


# --- vision ---------------------------------------------------------------------------------------------------------


def _vision(config: RunConfig, load: Load) -> Flops:
    """FLOPs of the tower, which every rank of the first stage runs on all images; the layers behind the features' run
    too. Features that are read cost nothing here."""
    if config.data.features:
        return Flops()
    forward, backward = tower_flops(config.model.vision, load.rows * load.tiles)
    return Flops(forward, 0.0 if config.optim.freeze_vision else backward)


def _projector(config: RunConfig, load: Load) -> Flops:
    optim, tokens = config.optim, load.rows * load.tiles * load.tile_tokens
    products = [2.0 * tokens * columns * rows for columns, rows in projector_matrices(config)]
    forward, trained = sum(products), not optim.freeze_projector
    to_weights = forward * trained
    to_inputs = forward if not optim.freeze_vision else sum(products[1:]) * trained
    return Flops(forward, to_weights + to_inputs)


def projector_flops(config: RunConfig, load: Load) -> float:
    """FLOPs of the projector's forward pass over all tiles of a micro-batch."""
    return _projector(config, load).forward
