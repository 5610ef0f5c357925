"""Stand-ins for the modules of Transformer Engine 2.9.0 that Megatron-Core 0.15.3 builds a decoder of.

Each keeps for the backward pass what its autograd function saves, makes what that one makes on the way, sends the same
messages, and computes nothing. Files and lines are of ``transformer_engine/pytorch/`` 2.9.0:

===================  ====================================  ============================================================
LayerNormLinear      module/layernorm_linear.py:448        the input, the norm's output before it is gathered if the
                                                           weight is trained (:362), a float32 a token
Linear               module/linear.py:389 and :423         the input if the weight is trained
RMSNorm              ops/basic/rmsnorm.py:202              the input, a float32 a token
DotProductAttention  dot_product_attention/backends.py:    queries, keys, values, the output, a float32 a query and
                     1309, utils.py:2003, and with         head (cuDNN's); values that are a view are copied first.
                     context parallelism                   Over context ranks rehearsed_te_ring.py: keys and values as
                     context_parallel.py:1784              the last message brought them, which are as many
rotary embedding     attention/rope.py:152                 the angles
===================  ====================================  ============================================================

In FP8 matrices are kept as :mod:`nemo_pre.compat.rehearsed_te_quantized` says: of an input the transposed copy alone
(layernorm_linear.py:410, linear.py:377-385), or the rows where it is gathered again over sequence-parallel ranks and
scales are a tensor's; weights beside their bf16 ones, both ways where a gradient goes through them
(layernorm_linear.py:285, linear.py:243), from the step's first micro-batch on (base.py:1333). Attention stays bf16;
with delayed scaling it notes largest values of three products all the same (dot_product_attention.py:978 and :756).

What is assumed, and is not in these sources: that cuDNN's attention is chosen, as on Hopper without flash-attn; what
kernels take while they run, and cuBLAS' workspace of 32 MiB.
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_pre.compat.rehearsed_kernels import attention, pairs_of
from nemo_pre.compat.rehearsed_te_autocast import BACKWARD, Autocast, LargestValues, Recipe
from nemo_pre.compat.rehearsed_te_quantized import NotTransformerEngines, Quantized, gathered, quantized
from nemo_pre.compat.rehearsed_te_ring import Ring, ring_attention


def count_flops(flops: float) -> None:
    """Told the FLOPs that torch does not see; a rehearsal puts its own counter here."""


Factor: TypeAlias = Tensor | Quantized


def _product(left: Factor, right: Factor, like: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T`` of ``[M, K]`` and ``[N, K]``, in the type of ``like``; of FP8 from the rows of both."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return torch.mm(left, right.t()) if bias is None else torch.addmm(bias, left, right.t())
    rows, others = _rows(left), _rows(right)
    if rows.shape[1] != others.shape[1]:
        raise NotTransformerEngines(f"FP8 is given {list(rows.shape)} and {list(others.shape)}.")
    count_flops(2.0 * rows.shape[0] * rows.shape[1] * others.shape[0])
    return like.new_zeros((rows.shape[0], others.shape[0]))


def _rows(factor: Factor) -> Tensor:
    found = factor.row if isinstance(factor, Quantized) else factor
    if found is None:
        raise NotTransformerEngines("A product in FP8 has no copy of its rows.")
    return found


def _transposed(factor: Factor) -> Factor:
    """The factor as its transposed copy, which FP8 must have."""
    if isinstance(factor, Tensor):
        return factor.t()
    return Quantized(row=factor.column, column=factor.row)


def _gather(local: Tensor, group: Any) -> Tensor:
    out = local.new_empty((local.shape[0] * group.size(), *local.shape[1:]))
    dist.all_gather_into_tensor(out, local.contiguous(), group=group)
    return out


def _scatter(whole: Tensor, group: Any) -> Tensor:
    out = whole.new_empty((whole.shape[0] // group.size(), *whole.shape[1:]))
    dist.reduce_scatter_tensor(out, whole.contiguous(), group=group)
    return out


def _largest_value(recipe: Recipe | None, of: Tensor, group: Any) -> None:
    """Scaling a gathered tensor as a whole needs the largest value of all ranks (linear.py:1649)."""
    if recipe is not None and recipe.name == "tensorwise":
        dist.all_reduce(of.new_zeros(1, dtype=torch.float32), op=dist.ReduceOp.MAX, group=group)


class _Layer(nn.Module):
    """What the two linear layers have in common: their cut over ranks, and FP8 copies of the weight."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        bias: bool = True,
        return_bias: bool = False,
        parallel_mode: str | None = None,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **others: Any,
    ) -> None:
        super().__init__()
        if fuse_wgrad_accumulation:
            raise NotTransformerEngines("Gradients that are added where they are made (Apex) have no stand-in.")
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.tp_group, self.tp_size, self.parallel_mode = tp_group, tp_size, parallel_mode
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = False
        self.quantized_weight: Quantized | None = None
        self.notes_largest_values = False
        on = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self.weight = nn.Parameter(torch.empty(self.out_features, self.in_features, dtype=params_dtype, device=on))
        self._mark(self.weight, parallel_mode is not None, 1 if parallel_mode == "row" else 0)
        if bias:
            self.bias = nn.Parameter(torch.empty(self.out_features, dtype=params_dtype, device=on))
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]
            else:
                self._mark(self.bias, parallel_mode is not None, 0)
        else:
            self.bias = None  # type: ignore[assignment]

    @staticmethod
    def _mark(parameter: Any, parallel: bool, dimension: int) -> None:
        parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = parallel, dimension, 1

    @property
    def gathers(self) -> bool:
        """Whether the input is cut over the group's ranks along the sequence."""
        return self.parallel_mode == "column" and self.sequence_parallel

    def weight_of(self, recipe: Recipe | None, columns: bool) -> Factor:
        """The weight as it is multiplied; in FP8 from the first micro-batch's copies on."""
        if recipe is None:
            return self.weight
        known = self.quantized_weight
        if known is None or (columns and known.column is None and not recipe.blockwise):
            self.quantized_weight = known = None  # the former copies go before new ones come
            self.quantized_weight = known = quantized(self.weight, recipe, columns=columns, weight=True)
        elif columns and known.column is None:
            known.column = self.weight.new_zeros(self.weight.shape[::-1], dtype=torch.uint8)
            known.column_scales = known.row_scales
        return known

    def _biased(self, out: Tensor) -> Any:
        return (out, self.bias) if self.return_bias else out


def _sum_of_ranks(layer: _Layer, gradient: Tensor) -> Tensor:
    """A column-parallel layer's input gradient, summed over its ranks."""
    if layer.parallel_mode != "column" or layer.tp_size == 1:
        return gradient
    if layer.sequence_parallel:
        return _scatter(gradient, layer.tp_group)
    dist.all_reduce(gradient, group=layer.tp_group)
    return gradient


def _output_gradient(layer: _Layer, gradient: Tensor, recipe: Recipe | None, columns: bool) -> Any:
    """The output's gradient as both products take it (base.py:1131): of all sequence-parallel ranks, and in FP8."""
    gradient = gradient.reshape(-1, gradient.shape[-1]).contiguous()
    gathers = layer.parallel_mode == "row" and layer.sequence_parallel
    if recipe is None:
        return _gather(gradient, layer.tp_group) if gathers else gradient
    if not gathers:
        return quantized(gradient, recipe, columns=columns)
    _largest_value(recipe, gradient, layer.tp_group)
    local = quantized(gradient, recipe, columns=columns and recipe.blockwise)
    return gathered(local, recipe, layer.tp_group, rows=True, columns=columns)


def _weight_gradient(gradient: Any, total: Any, layer: _Layer, recipe: Recipe | None) -> tuple[Tensor, Tensor | None]:
    """The product of ``[M, N]`` and ``[M, K]``, and the bias' gradient, which comes from the same kernel."""
    if recipe is None:
        made = torch.mm(gradient.t(), total)
    else:
        if total.column is None:
            assert total.row is not None
            total.column = total.row.new_zeros(total.row.shape[::-1])
        made = _product(_transposed(gradient), _transposed(total), layer.weight)
    return made, layer.weight.new_empty(layer.out_features) if layer.use_bias else None


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, graph: bool) -> Tensor:
        recipe, keeps = Autocast.recipe, graph and weight.requires_grad
        flat = inp.reshape(-1, inp.shape[-1])
        source: Any = flat
        if recipe is not None:
            if layer.gathers:
                raise NotTransformerEngines("A column-parallel layer without a norm, in FP8, has no stand-in.")
            source = quantized(flat, recipe, columns=keeps and not layer.save_original_input)
        total = _gather(flat, layer.tp_group) if layer.gathers else source
        columns = (graph and inp.requires_grad) or Autocast.recomputed
        multiplied = layer.weight_of(recipe, columns)
        out = _product(total, multiplied, inp, None if layer.return_bias else bias)
        del total
        if layer.parallel_mode == "row" and layer.tp_size > 1:
            if layer.sequence_parallel:
                out = _scatter(out, layer.tp_group)
            else:
                dist.all_reduce(out, group=layer.tp_group)
        if graph:
            ctx.layer, ctx.recipe, ctx.shape = layer, recipe, inp.shape
            ctx.weight = multiplied
            ctx.reduces = Autocast.reduces_in_backward(any(ctx.needs_input_grad))
            if not keeps:
                kept = []
            elif recipe is None or layer.save_original_input:
                kept = [inp]
            else:
                source.drop_rows()
                kept = source.tensors()
            ctx.save_for_backward(*kept)
        return out.view(-1, *inp.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, out_gradient: Tensor) -> Any:
        layer, recipe = ctx.layer, ctx.recipe
        wants_input, wants_weight = ctx.needs_input_grad[:2]
        gradient = _output_gradient(layer, out_gradient, recipe, columns=wants_weight)
        total: Any = None
        if wants_weight:
            kept = ctx.saved_tensors
            if recipe is None:
                total = kept[0].reshape(-1, ctx.shape[-1])
                total = _gather(total, layer.tp_group) if layer.gathers else total
            elif layer.save_original_input:
                total = quantized(kept[0].reshape(-1, ctx.shape[-1]), recipe, rows=not recipe.blockwise, columns=True)
            else:
                total = Quantized(column=kept[0], column_scales=kept[1] if recipe.blockwise else None)
        whole = made = bias_made = None
        if wants_input:
            whole = _product(gradient, _transposed(ctx.weight), out_gradient)
            summed = _sum_of_ranks(layer, whole)
        if wants_weight:
            made, bias_made = _weight_gradient(gradient, total, layer, recipe)
        if ctx.reduces:
            LargestValues.reduce(BACKWARD)
        return summed.view(ctx.shape) if wants_input else None, made, bias_made, None, None


class Linear(_Layer):
    """``transformer_engine.pytorch.Linear``."""

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        graph = torch.is_grad_enabled()
        LargestValues.of(self, products=1, device=inp.device)
        return self._biased(_LinearFunction.apply(inp, self.weight, self.bias, self, graph))


class _NormLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inp: Tensor, norm: Tensor, weight: Tensor, bias: Tensor | None, layer: Any, graph: bool
    ) -> Tensor:
        recipe, keeps = Autocast.recipe, graph and weight.requires_grad
        flat = inp.reshape(-1, inp.shape[-1])
        normed: Any = flat.clone()
        statistics = flat.new_empty(flat.shape[0], dtype=torch.float32)
        if recipe is not None:
            if layer.gathers:
                _largest_value(recipe, flat, layer.tp_group)
            normed = quantized(normed, recipe, columns=keeps and (recipe.blockwise or not layer.gathers))
        if layer.gathers:
            total = (
                _gather(normed, layer.tp_group)
                if recipe is None
                else gathered(normed, recipe, layer.tp_group, rows=True, columns=False)
            )
        else:
            total = normed
        multiplied = layer.weight_of(recipe, columns=graph)
        out = _product(total, multiplied, inp, None if layer.return_bias else bias)
        del total
        if graph:
            if not keeps:
                normed = None
            elif recipe is not None and (recipe.blockwise or not layer.gathers):
                normed.drop_rows()
            kept = [] if normed is None else [normed] if recipe is None else normed.tensors()
            ctx.layer, ctx.recipe, ctx.weight, ctx.shape = layer, recipe, multiplied, inp.shape
            ctx.reduces = Autocast.reduces_in_backward(any(ctx.needs_input_grad))
            ctx.save_for_backward(flat, statistics, *kept)
        return out.view(-1, *inp.shape[1:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, out_gradient: Tensor) -> Any:
        layer, recipe = ctx.layer, ctx.recipe
        flat, _, *kept = ctx.saved_tensors
        wants_weight = ctx.needs_input_grad[2]
        gradient = _output_gradient(layer, out_gradient, recipe, columns=True)
        total: Any = None
        if wants_weight:
            total = _kept_norm(kept, recipe, layer)
        del kept
        whole = _product(gradient, _transposed(ctx.weight), out_gradient)
        summed = _sum_of_ranks(layer, whole)
        made = bias_made = None
        if wants_weight:
            made, bias_made = _weight_gradient(gradient, total, layer, recipe)
            if layer.gathers:
                total = None  # layernorm_linear.py:915
        found = summed.clone()  # the norm's backward pass
        if ctx.reduces:
            LargestValues.reduce(BACKWARD)
        return found.view(ctx.shape), flat.new_empty(flat.shape[1]), made, bias_made, None, None


def _kept_norm(kept: list[Tensor], recipe: Recipe | None, layer: Any) -> Factor:
    """The norm's output of all sequence-parallel ranks, from what was kept of this one's."""
    if recipe is None:
        return _gather(kept[0], layer.tp_group) if layer.gathers else kept[0]
    if not layer.gathers:
        return Quantized(column=kept[0], column_scales=kept[1] if recipe.blockwise else None)
    if recipe.blockwise:
        local = Quantized(column=kept[0], column_scales=kept[1])
        return gathered(local, recipe, layer.tp_group, rows=False, columns=True)
    return gathered(Quantized(row=kept[0]), recipe, layer.tp_group, rows=True, columns=False)


class LayerNormLinear(_Layer):
    """``transformer_engine.pytorch.LayerNormLinear``, with RMSNorm.

    Raises:
        NotTransformerEngines: another norm, or an output of the norm by itself.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        return_layernorm_output: bool = False,
        **others: Any,
    ) -> None:
        super().__init__(in_features, out_features, **others)
        if normalization != "RMSNorm" or return_layernorm_output:
            raise NotTransformerEngines(f"LayerNormLinear with {normalization} has no stand-in.")
        self.eps = eps
        self.layer_norm_weight = nn.Parameter(self.weight.new_empty(in_features))
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor, is_first_microbatch: bool | None = None) -> Any:
        graph = torch.is_grad_enabled()
        LargestValues.of(self, products=1, device=inp.device)
        out = _NormLinearFunction.apply(inp, self.layer_norm_weight, self.weight, self.bias, self, graph)
        return self._biased(out)


class _NormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inp: Tensor, weight: Tensor) -> Tensor:
        flat = inp.contiguous().view(-1, inp.shape[-1])
        ctx.save_for_backward(flat, flat.new_empty(flat.shape[0], dtype=torch.float32))
        return flat.clone().view(inp.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        flat, _ = ctx.saved_tensors
        return gradient.clone(), flat.new_empty(flat.shape[1])


class RMSNorm(nn.Module):
    """``transformer_engine.pytorch.RMSNorm``."""

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        hidden_size: int | None = None,
        **others: Any,
    ) -> None:
        super().__init__()
        hidden_size = normalized_shape if hidden_size is None else hidden_size  # its former name, Megatron 0.15's
        assert hidden_size is not None
        on = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        self.weight = nn.Parameter(torch.empty(hidden_size, dtype=params_dtype, device=on))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, inp: Tensor) -> Tensor:
        return _NormFunction.apply(inp, self.weight)


class DotProductAttention(nn.Module):
    """``transformer_engine.pytorch.DotProductAttention``: causal, by cuDNN, of tensors ``[Q, B, heads, D]``.

    Raises:
        NotTransformerEngines: what our models never ask of it.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        cp_group: Any = None,
        cp_global_ranks: Any = None,
        cp_comm_type: str = "p2p",
        **others: Any,
    ) -> None:
        super().__init__()
        self.ring: Ring | None = None
        if cp_group is not None and cp_group.size() > 1:
            if cp_comm_type != "p2p":
                raise NotTransformerEngines(f"Attention over context ranks with {cp_comm_type} has no stand-in.")
            self.ring = Ring(cp_group, tuple(cp_global_ranks), dist.get_rank(cp_group))
        self.notes_largest_values = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        attn_mask_type: str = "causal",
        **others: Any,
    ) -> Tensor:
        if attn_mask_type != "causal" or others:
            raise NotTransformerEngines(f"Attention with attn_mask_type={attn_mask_type} {others} has no stand-in.")
        LargestValues.of(self, products=3, device=query.device)
        # A layout that cuDNN takes: three tensors, each in one piece (utils.py:2003).
        query, key, value = (tensor.contiguous() for tensor in (query, key, value))
        if self.ring is not None:
            if query.dtype is torch.float32:
                raise NotTransformerEngines("Attention over context ranks has no kernel for float32.")
            return ring_attention(query, key, value, self.ring, count_flops)
        if query.dtype is torch.float32:
            return _unfused(query, key, value)
        pairs = query.shape[1] * pairs_of(query.shape[0], key.shape[0], causal=True)
        layout = (1, 2, 0, 3)
        query, key, value = (tensor.permute(layout) for tensor in (query, key, value))
        out = attention(query, key, value, pairs, count_flops)
        return out.permute(2, 0, 1, 3).flatten(2)


def _unfused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What there is for float32 (dot_product_attention/backends.py:350-545): PyTorch's own operations, and a mask that
    is made once for each length (softmax.py:65)."""
    length, rows, heads, width = query.shape
    if key.shape[2] != heads:
        key, value = (tensor.repeat_interleave(heads // key.shape[2], dim=2) for tensor in (key, value))
    query, key, value = (tensor.reshape(tensor.shape[0], rows * heads, width) for tensor in (query, key, value))
    scores = torch.bmm(query.transpose(0, 1), key.permute(1, 2, 0)).view(rows, heads, length, -1)
    scores = scores.masked_fill_(_causal_mask(length, scores.shape[3], query.device), -10000.0)
    weights = torch.softmax(scores, dim=-1).view(rows * heads, length, -1)
    out = torch.bmm(weights, value.transpose(0, 1)).view(rows, heads, length, width)
    return out.permute(2, 0, 1, 3).contiguous().flatten(2)


@functools.cache
def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).triu_(1)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return torch.empty_like(tensor, memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(gradient, memory_format=torch.contiguous_format), None


def apply_rotary_pos_emb(
    tensor: Tensor, angles: Tensor, tensor_format: str = "sbhd", interleaved: bool = False, fused: bool = False
) -> Tensor:
    """Queries or keys, turned by one sequence of angles ``[Q, 1, 1, D]`` for all rows.

    Raises:
        NotTransformerEngines: another layout, or angles of each row.
    """
    if tensor_format != "sbhd" or not fused or angles.shape[1] != 1:
        raise NotTransformerEngines(
            f"The rotary embedding of {tensor_format} and {list(angles.shape)} has no stand-in."
        )
    return _Rotary.apply(tensor, angles)
