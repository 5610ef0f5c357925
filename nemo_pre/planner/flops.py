"""Floating-point operations of matrix products, by part, for one micro-batch on one rank.

A product of ``[m, k]`` and ``[k, n]`` is ``2 m k n``; backward, one such product for the input's gradient and one for
the weight's. Everything else (norms, softmax, activations) is left out, as :mod:`torch.utils.flop_counter` does.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemo_pre.config.derived import padded_vocab_size
from nemo_pre.config.schema import ParallelConfig, RunConfig
from nemo_pre.planner.load import Load
from nemo_pre.planner.memory import has_moving_anchor
from nemo_pre.planner.parameters import (
    placed_chunks,
    prediction_head_matrices,
    projector_matrices,
    target_layers_among,
)
from nemo_pre.planner.vision import tower_flops


@dataclass(frozen=True)
class Flops:
    """Of a forward pass, and of the backward pass with what it recomputes."""

    forward: float = 0.0
    backward: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor)

    @property
    def total(self) -> float:
        return self.forward + self.backward


def chunk_flops(
    config: RunConfig, load: Load, layers: range, first: bool, last: bool, dense: bool
) -> dict[str, Flops]:
    """By part, of the chunk with the decoder layers ``layers`` on one tensor-parallel rank.

    Args:
        dense: attention computes every pair of tokens and masks it afterwards, as on CPU ranks; else only pairs that
            see each other count.
    """
    found = {
        "decoder matrices": _decoder_matrices(config, load) * len(layers),
        "decoder attention": _decoder_attention(config, load, dense) * len(layers),
        "PRe heads": _prediction_heads(config, load, layers),
    }
    if load.branch:
        found["teacher"] = _teacher(config, load, dense) * len(layers)
    if first:
        found |= {"vision": _vision(config, load), "projector": _projector(config, load)}
    if last:
        found["logits"] = _logits(config, load)
        if load.branch:
            found["LaVer heads"] = _laver_heads(config, load)
    return found


def stage_flops(config: RunConfig, load: Load, stage: int, dense: bool) -> list[dict[str, Flops]]:
    """The same of every chunk of a pipeline stage."""
    return [
        chunk_flops(config, load, layers, first=first, last=last, dense=dense)
        for layers, first, last in placed_chunks(config, stage)
    ]


def model_flops(config: RunConfig, load: Load, dense: bool = False) -> dict[str, float]:
    """Of a whole step's global batch by part, as if on one rank: without what layouts repeat or recompute."""
    from dataclasses import replace

    alone = replace(config, parallel=ParallelConfig())
    parts = chunk_flops(
        alone, replace(load, replicas=1, shards=1), range(config.model.language.num_layers), True, True, dense
    )
    micro_batches = config.trainer.global_batch_size / load.rows
    return {part: flops.total * micro_batches for part, flops in parts.items() if flops.total}


def visible_pairs(config: RunConfig, load: Load, samples: bool, branch: bool) -> float:
    """Pairs of tokens of a row that see each other; within an image both ways with mixed attention."""
    mixed = config.model.attention == "mixed"
    per_image = load.visual / max(load.images, 1)
    both_ways = load.images * per_image * (per_image - 1) / 2 if mixed else 0.0
    pairs = 0.0
    if samples:
        rows = load.images if config.data.packing else 1  # packed samples do not see each other; taken to be equal
        length = load.length / rows
        pairs += rows * length * (length + 1) / 2 + both_ways
    if branch and config.objective.laver.sequence == "whole":
        pairs += load.branch * (load.branch + 1) / 2 + both_ways
    elif branch:
        pairs += load.images * per_image**2
    return pairs


# --- the decoder ----------------------------------------------------------------------------------------------------


def _decoder_matrices(config: RunConfig, load: Load) -> Flops:
    forward = 2.0 * load.tokens * _layer_weights(config)
    recomputed = forward if config.parallel.recompute == "full" else 0.0
    return Flops(forward, forward * (1 if config.optim.freeze_language else 2) + recomputed)


def _layer_weights(config: RunConfig) -> float:
    """Elements of a decoder layer's matrices on a tensor-parallel rank."""
    language = config.model.language
    width = language.hidden_size
    key_width = width // language.num_attention_heads * language.num_query_groups
    return (2 * width * width + 2 * width * key_width + 3 * width * language.ffn_hidden_size) / config.parallel.tensor


def _decoder_attention(config: RunConfig, load: Load, dense: bool) -> Flops:
    pairs = float(load.keys**2) if dense else visible_pairs(config, load, samples=True, branch=load.branch > 0)
    forward = _attention(config, load, pairs)
    recomputed = 0.0 if config.parallel.recompute == "none" else forward
    return Flops(forward, 2 * forward + recomputed)


def _attention(config: RunConfig, load: Load, pairs: float) -> float:
    """Scores and weighted sums: 4 x head width per head and pair."""
    return 4.0 * load.rows * pairs * config.model.language.hidden_size / config.parallel.tensor / load.replicas


def _teacher(config: RunConfig, load: Load, dense: bool) -> Flops:
    pairs = float(load.branch**2) if dense else visible_pairs(config, load, samples=False, branch=True)
    tokens = load.rows * load.branch // load.replicas
    return Flops(2.0 * tokens * _layer_weights(config) + _attention(config, load, pairs))


def _logits(config: RunConfig, load: Load) -> Flops:
    vocabulary = padded_vocab_size(config.model.language.vocab_size) / config.parallel.tensor
    forward = 2.0 * load.sample_tokens * vocabulary * config.model.language.hidden_size
    return Flops(forward, forward * (1 if config.optim.freeze_language else 2))


# --- vision ---------------------------------------------------------------------------------------------------------


def _vision(config: RunConfig, load: Load) -> Flops:
    """Every rank of the first stage runs the tower on all images; the layers behind the features' run too. Features
    that are read cost nothing here."""
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
    return Flops(forward + (forward if has_moving_anchor(config) else 0.0), to_weights + to_inputs)


# --- heads ----------------------------------------------------------------------------------------------------------


def _prediction_heads(config: RunConfig, load: Load, layers: range) -> Flops:
    """On the mean rank: sequence and context parallelism share the visual tokens out."""
    pre = config.objective.pre
    if not pre.enabled:
        return Flops()
    taps = len(target_layers_among(config, layers))
    if pre.variant == "global":
        inputs: float = load.rows * load.images
    else:
        inputs = load.rows * load.visual / load.replicas / load.shards
    forward = taps * sum(2.0 * inputs * columns * rows for columns, rows in prediction_head_matrices(config))
    return Flops(forward, 2 * forward)


def _laver_heads(config: RunConfig, load: Load) -> Flops:
    """The student's head both ways, the teacher's forward, and three products per Gram matrix."""
    laver, width = config.objective.laver, config.model.language.hidden_size
    hidden, ranks = laver.head_hidden_width, load.replicas * load.shards
    inputs = load.rows * load.visual / ranks
    head = 2.0 * inputs * (2 * width * hidden + hidden**2)
    share = laver.mask_ratio if laver.gram_positions == "masked" else 1.0
    per_image = share * load.visual / load.images
    if laver.gram_scope == "micro_batch":
        entries = (load.rows * load.images * per_image) ** 2  # on one rank, the fullest
    else:
        entries = load.rows * load.images * per_image**2 / ranks
    return Flops(2 * head + 3 * 2.0 * entries * width, 2 * head)
