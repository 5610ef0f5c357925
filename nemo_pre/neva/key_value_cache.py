"""Keys and values of the tokens a model has seen, so that generation runs only new ones.

While :func:`cached_attention` is entered, every decoder layer of the chunks attends with a dense mask to all tokens of
the cache, and positions come from the cache too; that is one rule for causal and mixed attention, for positions in one
and two dimensions, and for prompts of different lengths in a batch. It replaces what Megatron's own inference contexts
do, which know neither structures nor a row's own positions. Tensor and pipeline parallelism work as in training;
sequence and context parallelism cut a sequence that is one token long, and are refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_pre.neva.mixed_attention import attend_dense
from nemo_pre.neva.model import MCoreVisualNevaModel
from nemo_pre.neva.rotary import VisualRotaryEmbedding
from nemo_pre.parallel.sequence_layout import SequenceLayout
from nemo_pre.parallel.token_streams import (
    ORDER,
    SAMPLES,
    SEQUENCE,
    StreamShape,
    decoder_streams,
    samples_structure,
)

PADDING_SEQUENCE = -1


@dataclass
class CachedBatch:
    """What a rank knows of the tokens of one micro-batch; room for ``K`` tokens a row, prompt and answer.

    Attributes:
        structure_BK3: of all tokens, see :mod:`nemo_pre.parallel.token_streams`.
        positions_3BK: rotary positions.
        start, end: the tokens at hand.
        keys, values: ``[K, B, groups, head_dim]`` by layer number.
    """

    structure_BK3: Tensor
    positions_3BK: Tensor
    start: int
    end: int
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def advance(self) -> None:
        """Go on to the next token of every row."""
        self.start, self.end = self.end, self.end + 1

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep a layer's new keys and values; returns those of all tokens so far."""
        for kept, new in ((self.keys, key), (self.values, value)):
            if layer not in kept:
                kept[layer] = new.new_empty(self.structure_BK3.shape[1], *new.shape[1:])
            kept[layer][self.start : self.end] = new
        return self.keys[layer][: self.end], self.values[layer][: self.end]


def cached_batch(
    layout: SequenceLayout, shape: StreamShape, lengths_B: Tensor, new_tokens: int, device: torch.device | int
) -> CachedBatch:
    """A micro-batch of prompts, padded on the right, and room for ``new_tokens`` more in each row.

    Args:
        layout: of the prompts, on the CPU.
        lengths_B: tokens of each prompt without its padding.
    """
    prompt_BS3 = samples_structure(layout, shape.mixed_attention)
    positions_3BS = decoder_streams(layout, None, shape).positions_3BQ
    batch, length = prompt_BS3.shape[:2]
    is_real_BS = torch.arange(length) < lengths_B[:, None]
    prompt_BS3[..., SEQUENCE] = torch.where(is_real_BS, prompt_BS3[..., SEQUENCE], PADDING_SEQUENCE)
    answer_BT3 = torch.full((batch, new_tokens, 3), -1, dtype=prompt_BS3.dtype)
    answer_BT3[..., SEQUENCE] = SAMPLES
    answer_BT3[..., ORDER] = length + torch.arange(new_tokens, dtype=prompt_BS3.dtype)
    # A text token follows the largest position so far, on whichever axis.
    largest_B = positions_3BS.masked_fill(~is_real_BS, -1).amax(dim=(0, 2))
    following_BT = largest_B[:, None] + 1 + torch.arange(new_tokens)
    return CachedBatch(
        torch.cat([prompt_BS3, answer_BT3], dim=1).to(device),
        torch.cat([positions_3BS, following_BT.expand(3, -1, -1)], dim=2).to(device),
        start=0,
        end=length,
    )


class KeyValueCache:
    """The micro-batches of one generation; ``current`` is the one a chunk runs."""

    def __init__(self, batches: list[CachedBatch]) -> None:
        self.batches = batches
        self.current = batches[0]


def can_cache(chunk: MCoreVisualNevaModel) -> bool:
    """Whether the layout leaves sequences whole."""
    return not chunk.sequence_parallel_lm and chunk.context_parallel_lm == 1


@contextmanager
def cached_attention(chunks: list[MCoreVisualNevaModel], cache: KeyValueCache) -> Iterator[None]:
    """The chunks attend through the cache, and as before when the block ends."""
    with ExitStack() as changes:
        for chunk in chunks:
            assert can_cache(chunk)
            language = chunk.language_model
            axes = chunk.config.rope_axes or [0] * (chunk.config.language_transformer_config.kv_channels // 2)
            rotary = _CachedPositions(VisualRotaryEmbedding(chunk.inverse_frequency(), axes), cache)
            for target, name, value in (
                (language, "rotary_pos_emb", rotary),
                (language, "position_embedding_type", "mrope"),
                (language, "mrope_section", []),
                (language.config, "apply_rope_fusion", False),
            ):
                changes.enter_context(_set(target, name, value))
            for layer in language.decoder.layers:
                attention = layer.self_attention.core_attention
                forward = partial(_attend, cache, layer.layer_number, 1.0 / math.sqrt(language.config.kv_channels))
                changes.enter_context(_set(attention, "forward", forward))
        yield


@contextmanager
def _set(target: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute for the length of a block; one that was the class's, or not there, is removed again."""
    own = name in vars(target) or name in getattr(target, "_modules", {})
    before = getattr(target, name, None)
    setattr(target, name, value)
    try:
        yield
    finally:
        if own:
            setattr(target, name, before)
        else:
            delattr(target, name)


class _CachedPositions(nn.Module):
    """Stands in the place of the model's rotary embedding and gives the angles of the tokens that are being run."""

    def __init__(self, rotary: VisualRotaryEmbedding, cache: KeyValueCache) -> None:
        super().__init__()
        self._rotary, self._cache = rotary, cache

    def forward(self, *_: Any, **__: Any) -> Tensor:
        batch = self._cache.current
        return self._rotary(batch.positions_3BK[:, :, batch.start : batch.end])


def _attend(
    cache: KeyValueCache, layer: int, scale: float, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> Tensor:
    """The new tokens' queries ``[Q, B, N, D]`` over all tokens of the current batch; returns ``[Q, B, N * D]``."""
    batch = cache.current
    key, value = batch.append(layer, key, value)
    query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    context = attend_dense(query, key, value, batch.structure_BK3[:, : batch.end], batch.start, scale)
    return context.permute(2, 0, 1, 3).flatten(2)
