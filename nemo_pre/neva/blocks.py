"""The decoder's layers as users count them: one block is a mixer of tokens and the MLP behind it.

In a ``GPTModel`` a block is a layer. In a ``HybridModel`` attention, Mamba and MLP are layers of their own, which its
pattern names: ``*-*-`` are two blocks of two layers.
"""

from __future__ import annotations

from typing import Any

from torch import nn

MLPS = "-E"  # of a pattern's letters those that continue the block before them: MLP and mixture of experts
PIPE, FURTHER_TOKENS = "|", "/"


def block_ends(pattern: str) -> list[int]:
    """The number, 1-based, of every block's last layer, in a pattern of Megatron's hybrid layers."""
    layers = pattern.split(FURTHER_TOKENS)[0].replace(PIPE, "")
    return [number for number, _ in enumerate(layers, 1) if number == len(layers) or layers[number] not in MLPS]


def num_blocks(config: Any) -> int:
    """Blocks of the whole decoder, by its configuration."""
    pattern = getattr(config, "hybrid_layer_pattern", None)
    return config.num_layers if pattern is None else len(block_ends(pattern))


def block_output(language_model: Any, number: int) -> nn.Module | None:
    """The layer whose output is that of block ``number`` of the whole decoder; None: another chunk has it."""
    pattern = getattr(language_model, "hybrid_layer_pattern", None)
    if pattern is not None:
        ends = block_ends(pattern)
        if number > len(ends):
            return None
        number = ends[number - 1]
    return next((layer for layer in language_model.decoder.layers if layer.layer_number == number), None)
