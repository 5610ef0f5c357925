"""Mixed attention as a ``core_attention`` of Megatron: visual tokens of one image see each other both ways.

Everything else is causal, and tokens of different sequences never see each other (LaVer, arXiv 2512.06281). Which
token is what comes in the place of the attention mask, as the structure of :mod:`nemo_pre.parallel.token_streams`.
There is no fallback to causal attention: without a structure it raises.

Three backends: ``dense`` gives PyTorch's scaled-dot-product attention a boolean mask (exact, memory B x Q x K, any
device); ``flex`` compiles the rule into FlexAttention's block-sparse Triton kernels (CUDA only; it has no backward
pass on a CPU); ``split`` attends run by run without a mask (:mod:`nemo_pre.neva.split_attention`, any device).
Transformer Engine's ``arbitrary`` mask would leave its unfused kernel and no context parallelism.

Context parallelism is exact: every rank gathers the keys and values of its context group and attends with its own
queries. That costs K + V of the whole sequence in memory and one all-gather per layer and direction; a ring would need
the merge of partial results under a mask that no ring kernel has.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from nemo_pre.config.schema import ModelConfig
from nemo_pre.neva.split_attention import RowRuns, attend_runs, runs_of_rows
from nemo_pre.options import alternatives
from nemo_pre.parallel.gather import gather_first_dimension
from nemo_pre.parallel.token_streams import IMAGE, ORDER, SEQUENCE, may_attend

REMEMBERED_MASKS = 16  # micro-batches in flight, times two for the teacher's


class MixedAttention(MegatronModule):
    """Attention in the place of Megatron's ``DotProductAttention``: grouped queries, no dropout.

    Raises:
        ValueError: an option of the configuration that it does not implement.
    """

    backend = "dense"

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
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        for option, value, supported in (
            ("attention_dropout", dropout, 0.0),
            ("window_size", config.window_size, None),
            ("softmax_type", config.softmax_type, "vanilla"),
            ("apply_query_key_layer_scaling", config.apply_query_key_layer_scaling, False),
        ):
            if value != supported:
                raise ValueError(f"Mixed attention needs {option}={supported}, not {value}.")
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

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
        """Attend with this rank's queries ``[Q, B, N, D]`` to all keys and values ``[Q, B, G, D]``.

        Args:
            attention_mask: the structure int32 ``[B, K, 3]`` of all context ranks' tokens; on the device, or on the
                CPU for ``split``.

        Returns:
            ``[Q, B, N * D]``.
        """
        if attention_mask is None:
            raise ValueError(
                "Mixed attention was given no token structure and would be causal: build the model with "
                "model.attention=mixed and run it through MCoreVisualNevaModel."
            )
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("Mixed attention takes neither attention_bias nor packed_seq_params.")
        size, rank = self.context_group.size(), self.context_group.rank()
        if size > 1:
            key = gather_first_dimension(key, self.context_group)
            value = gather_first_dimension(value, self.context_group)
        if attention_mask.shape != (key.shape[1], key.shape[0], 3):
            raise ValueError(
                f"The token structure has shape {list(attention_mask.shape)}, not "
                f"[batch, keys, 3] = {[key.shape[1], key.shape[0], 3]}."
            )
        attend = {"dense": attend_dense, "flex": _attend_flex, "split": attend_split}[self.backend]
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [B, heads, length, D]
        context = attend(query, key, value, attention_mask, rank * query.shape[2], self.softmax_scale)
        return context.permute(2, 0, 1, 3).flatten(2)


class FlexMixedAttention(MixedAttention):
    backend = "flex"


class SplitMixedAttention(MixedAttention):
    backend = "split"


def with_mixed_attention(layer_spec: ModuleSpec, backend: str) -> ModuleSpec:
    """Put mixed attention into a transformer layer's spec (changed in place and returned).

    Raises:
        ValueError: an unknown backend, or one this machine cannot run.
    """
    attention = {"dense": MixedAttention, "flex": FlexMixedAttention, "split": SplitMixedAttention}
    if backend not in attention:
        allowed = alternatives(ModelConfig, "attention_backend")
        raise ValueError(f"model.attention_backend={backend} is unknown: choose {allowed}.")
    if backend == "flex" and not torch.cuda.is_available():
        raise ValueError("model.attention_backend=flex needs an NVIDIA GPU: choose auto, dense or split.")
    layer_spec.submodules.self_attention.submodules.core_attention = attention[backend]
    return layer_spec


def attend_dense(
    query: Tensor, key: Tensor, value: Tensor, structure_BK3: Tensor, first_query: int, scale: float
) -> Tensor:
    """Queries ``[B, N, Q, D]``, the tokens from ``first_query`` on, over keys and values ``[B, G, K, D]``."""
    num_queries = query.shape[2]

    def build() -> Tensor:
        queries = structure_BK3[:, first_query : first_query + num_queries]
        return may_attend(queries, structure_BK3)[:, None]

    mask = _MASKS.get("dense", structure_BK3, build)
    heads_per_group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(heads_per_group, dim=1) for tensor in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _attend_flex(
    query: Tensor, key: Tensor, value: Tensor, structure_BK3: Tensor, first_query: int, scale: float
) -> Tensor:
    flex_attention, create_block_mask = _compiled_flex()
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]

    def build() -> Any:
        rule = mask_rule(structure_BK3, first_query)
        with torch.no_grad():  # one compilation for training and evaluation
            return create_block_mask(rule, batch, None, num_queries, num_keys, device=query.device)

    block_mask = _MASKS.get("flex", structure_BK3, build)
    return flex_attention(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        block_mask=block_mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_split(
    query: Tensor, key: Tensor, value: Tensor, structure_BK3: Tensor, first_query: int, scale: float
) -> Tensor:
    """Attention without a mask, run by run; arguments and result are those of :func:`attend_dense`, but that the
    structure lies on the CPU, where the runs are worked out."""

    def build() -> list[RowRuns]:
        return runs_of_rows(structure_BK3, first_query, query.shape[2], query.device)

    return attend_runs(query, key, value, _MASKS.get("split", structure_BK3, build), scale)


def mask_rule(structure_BK3: Tensor, first_query: int) -> Callable[..., Tensor]:
    """:func:`nemo_pre.parallel.token_streams.may_attend` for one pair of tokens, as FlexAttention asks for it."""
    sequence, order, image = (structure_BK3[..., field].contiguous() for field in (SEQUENCE, ORDER, IMAGE))

    def rule(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q = q + first_query
        same_image = (image[b, k] == image[b, q]) & (image[b, q] >= 0)
        return (sequence[b, k] == sequence[b, q]) & ((order[b, k] <= order[b, q]) | same_image)

    return rule


@cache
def _compiled_flex() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Past its limit of compilations (8) torch would run FlexAttention uncompiled, with all scores in memory, and only
    # log it. Training, teacher, recomputation and evaluation, one row or several, need about a dozen.
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    # Steps differ in length; and what cannot be compiled as a whole is an error, not another kernel.
    return torch.compile(flex_attention, dynamic=True, fullgraph=True), torch.compile(create_block_mask, dynamic=True)


class _MaskMemory:
    """The masks of the latest structures, so that a micro-batch's layers, and their recomputation, share one.

    It holds on to each structure, so that the address it is known by belongs to no other tensor meanwhile.
    """

    def __init__(self) -> None:
        self._masks: OrderedDict[tuple[Any, ...], tuple[Tensor, Any]] = OrderedDict()

    def get(self, backend: str, structure: Tensor, build: Callable[[], Any]) -> Any:
        key = (backend, structure.data_ptr(), tuple(structure.shape), structure.device)
        if key not in self._masks:
            self._masks[key] = (structure, build())
            while len(self._masks) > REMEMBERED_MASKS:
                self._masks.popitem(last=False)
        self._masks.move_to_end(key)
        return self._masks[key][1]


_MASKS = _MaskMemory()
