"""Causal self-attention under context parallelism, without Transformer Engine.

Megatron-Core runs context parallelism in Transformer Engine's ring attention, which needs a GPU. Here each rank
gathers every rank's keys and values and attends with its own queries: more memory, the same numbers. It is the
reference that a ring attention can be tested against, and what CPU ranks use.

Which tokens a context rank holds is :func:`nemo_pre.parallel.sequence_layout.local_positions`' to say.

Shapes: S sequence on this rank, C context ranks, B batch, N query heads and G key/value heads on this
tensor-parallel rank, D head width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from nemo_pre.parallel.gather import gather_first_dimension
from nemo_pre.parallel.sequence_layout import local_positions


class GatheredContextAttention(MegatronModule):
    """A ``core_attention`` for a ``ModuleSpec``, in place of Megatron's ``DotProductAttention``.

    Causal attention with grouped queries; softmax in float32 or better; dropout as in Megatron.

    Raises:
        ValueError: an option of the configuration that this reference does not implement.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"GatheredContextAttention is causal; attn_mask_type={attn_mask_type} was asked for.")
        for option, supported in {
            "window_size": None,
            "softmax_type": "vanilla",
            "apply_query_key_layer_scaling": False,
        }.items():
            if getattr(config, option) != supported:
                raise ValueError(
                    f"GatheredContextAttention needs {option}={supported}, not {getattr(config, option)}."
                )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.attention_dropout = torch.nn.Dropout(dropout)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend with this rank's queries [S, B, N, D] to all keys and values [S, B, G, D]; returns [S, B, N*D].

        ``attention_mask`` must be None: the causal mask follows from the true positions of the tokens.
        """
        if attention_mask is not None or attention_bias is not None or packed_seq_params is not None:
            raise ValueError(
                "GatheredContextAttention applies the causal mask itself: attention_mask, attention_bias and"
                " packed_seq_params must be None."
            )
        assert attn_mask_type in (None, AttnMaskType.causal), attn_mask_type
        size, rank = self.context_group.size(), self.context_group.rank()
        total = size * query.shape[0]
        positions = [local_positions(total, 1, 0, size, r).to(query.device) for r in range(size)]  # by rank
        if size > 1:
            key = gather_first_dimension(key, self.context_group)
            value = gather_first_dimension(value, self.context_group)

        heads_per_group = query.shape[2] // key.shape[2]
        key = key.repeat_interleave(heads_per_group, dim=2)  # [C*S, B, N, D]
        value = value.repeat_interleave(heads_per_group, dim=2)
        scores = torch.einsum("sbnd,tbnd->bnst", query, key) * self.softmax_scale
        hidden = torch.cat(positions)[None, :] > positions[rank][:, None]  # [S, C*S]
        scores = scores.masked_fill(hidden, float("-inf"))  # no row is empty: a token sees itself
        wide = torch.promote_types(scores.dtype, torch.float32)
        probabilities = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype)
        if self.config.sequence_parallel:
            probabilities = self.attention_dropout(probabilities)
        else:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                probabilities = self.attention_dropout(probabilities)
        context = torch.einsum("bnst,tbnd->sbnd", probabilities, value)
        return context.flatten(2)


def with_gathered_attention(layer_spec: ModuleSpec) -> ModuleSpec:
    """Put :class:`GatheredContextAttention` into a transformer layer's spec (changed in place and returned)."""
    layer_spec.submodules.self_attention.submodules.core_attention = GatheredContextAttention
    return layer_spec
