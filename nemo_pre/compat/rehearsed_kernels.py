"""Stand-ins for kernels that ask the device what it can do, or that are compiled for it: they allocate what kernels
allocate, keep for the backward pass what kernels keep, and compute nothing. Transformer Engine's are in
:mod:`nemo_pre.compat.rehearsed_te_layers`.

Applied only in the forked processes of :mod:`nemo_pre.rehearsal`. Sources of what is kept: FlashAttention's autograd
function keeps queries, keys, values, its output and a float32 per query and head (arXiv 2205.14135, algorithm 2;
torch's _scaled_dot_product_flash_attention has the same outputs).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nemo_pre.compat.cpu_adamw import GroupStepAdamW
from nemo_pre.compat.registry import Change, Patch, patch

Count = Callable[[float], None]  # told the FLOPs of a pass of attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, flops, count):
        out = torch.empty_like(query)
        statistics = query.new_empty(query.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, statistics)
        ctx.flops, ctx.count = flops, count
        count(flops)
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, statistics = ctx.saved_tensors
        torch.empty_like(statistics)  # the sums of output times gradient
        ctx.count(2 * ctx.flops)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None, None


def attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pairs: float, count: Count) -> torch.Tensor:
    """Attention of ``[B, heads, Q, D]`` over ``[B, groups, K, D]`` that looks at ``pairs`` pairs of tokens over all
    rows.

    Raises:
        ValueError: the tensors lie on different devices, have different types, or do not fit together.
    """
    if len({tensor.device for tensor in (query, key, value)}) > 1:
        raise ValueError(f"Attention is given tensors on {query.device}, {key.device} and {value.device}.")
    if len({tensor.dtype for tensor in (query, key, value)}) > 1:
        raise ValueError(f"Attention is given tensors of {query.dtype}, {key.dtype} and {value.dtype}.")
    alike = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    if not alike or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"Attention is given {list(query.shape)} queries, {list(key.shape)} keys, {list(value.shape)} values."
        )
    return _Attention.apply(query, key, value, 4.0 * query.shape[1] * query.shape[3] * pairs, count)


def pairs_of(queries: int, keys: int, causal: bool) -> float:
    """Pairs of tokens of a row that attention looks at; causal towards the lower right corner."""
    if not causal:
        return float(queries * keys)
    before = max(keys - queries, 0)
    inside = min(queries, keys)
    return float(queries * before + inside * (inside + 1) / 2)


def attention_without_kernels(count: Count) -> Patch:
    """The patch that puts :func:`attention` in the place of torch's, for tensors on the device."""

    @patch(
        "attention-without-kernels",
        why="torch's scaled-dot-product attention asks the device which kernels it has.",
        until="its choice of a kernel can be made for a fake device.",
        of={"torch": ("2.9", "2.11")},
    )
    def effects():
        functional = torch.nn.functional
        right = functional.scaled_dot_product_attention

        def attend(
            query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
        ) -> torch.Tensor:
            if query.device.type != "cuda":
                return right(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            if isinstance(attn_mask, torch.Tensor) and attn_mask.device != query.device:
                raise ValueError(f"Attention on {query.device} is given a mask on {attn_mask.device}.")
            causal = is_causal or isinstance(attn_mask, LowerRight)
            pairs = query.shape[0] * pairs_of(query.shape[2], key.shape[2], causal)
            return attention(query, key, value, pairs, count)

        yield Change(functional, "scaled_dot_product_attention", attend)

    return effects


class LowerRight:
    """What stands for :func:`torch.nn.attention.bias.causal_lower_right`, a tensor without memory."""

    def __init__(self, queries: int, keys: int) -> None:
        self.queries, self.keys = queries, keys


@patch(
    "fused-adamw",
    why="Transformer Engine's AdamW is what a GPU runs; torch's needs copies beside its states.",
    until="Transformer Engine has kernels for fake tensors.",
    of={"megatron-core": ("0.15.3", "0.19")},
)
def fused_adamw():
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
                    self.state[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)

    yield Change(GroupStepAdamW, "step", step)


@patch(
    "swiglu-in-one-kernel",
    why="Megatron's SwiGLU is compiled on a GPU, into a kernel that makes its result and nothing else; operation by"
    " operation its backward pass would hold twice as much for a moment.",
    until="torch.compile runs on fake tensors without a compiler.",
)
def swiglu_in_one_kernel():
    from megatron.core.fusions import fused_bias_swiglu

    def forward(gate_and_value):
        return gate_and_value.new_zeros((*gate_and_value.shape[:-1], gate_and_value.shape[-1] // 2))

    def backward(gradient, gate_and_value):
        return torch.zeros_like(gate_and_value)

    yield Change(fused_bias_swiglu, "swiglu", forward)
    yield Change(fused_bias_swiglu, "swiglu_back", backward)
