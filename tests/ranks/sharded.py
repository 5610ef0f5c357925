"""A sharded model's weights and gradients as one dict of full tensors, and back.

Where a parameter's slice lies in the full tensor is what Megatron's ``sharded_state_dict`` says, the same that its
distributed checkpoints rely on; here the tensors are put together in plain torch, and *every* copy of a replicated
parameter is looked at, not only the main one. Names are those of the unsharded model, layers numbered over the whole
depth: ``language_model.decoder.layers.5.mlp.linear_fc1.weight``.

On a rank: :func:`weight_shards`, :func:`gradient_shards`, :func:`load_full`. In the test: :func:`assemble`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# In checkpoints Megatron gives the norms of every layer spec the names they have when Transformer Engine fuses them.
NORM_NAMES = {
    r"self_attention\.linear_qkv\.layer_norm_(weight|bias)$": r"input_layernorm.\1",
    r"mlp\.linear_fc1\.layer_norm_(weight|bias)$": r"pre_mlp_layernorm.\1",
}


@dataclass
class Shard:
    """A rank's piece of the full tensor ``name``: ``full[bounds] == data``."""

    name: str
    full_shape: tuple[int, ...]
    bounds: tuple[tuple[int, int], ...]  # start and stop along each axis
    data: Tensor

    @property
    def index(self) -> tuple[slice, ...]:
        return tuple(slice(start, stop) for start, stop in self.bounds)


def weight_shards(chunks: list[Any]) -> list[Shard]:
    """This rank's parameters, in float32; ``chunks`` are its pipeline chunks without the DDP wrapper."""
    return [replace(s, data=s.data.detach().float().clone()) for s in _shards(chunks, lambda p: p.data)]


def gradient_shards(chunks: list[Any]) -> list[Shard]:
    """This rank's reduced gradients (``main_grad`` after Megatron's finalisation), in float32 or better.

    Frozen parameters have none. With the distributed optimizer call :func:`gather_gradients` first.
    """

    def gradient(parameter: Tensor) -> Tensor | None:
        return parameter.main_grad if parameter.requires_grad else None

    wide = {torch.float64}
    return [
        replace(s, data=(s.data if s.data.dtype in wide else s.data.float()).clone())
        for s in _shards(chunks, gradient)
    ]


def gather_gradients(ddp_chunks: list[Any]) -> None:
    """Complete every rank's ``main_grad`` where the distributed optimizer left each rank its own part only.

    The reduce-scatter leaves the other parts of the buffer unreduced; the optimizer never reads them, so
    overwriting them changes nothing.
    """
    for chunk in ddp_chunks:
        for bucket_group in chunk.bucket_groups:
            if not bucket_group.ddp_config.use_distributed_optimizer:
                continue
            group = bucket_group.intra_distributed_optimizer_instance_group
            for bucket in bucket_group.buckets:
                parts = list(bucket.grad_data.chunk(group.size()))
                gathered = [torch.empty_like(part) for part in parts]
                torch.distributed.all_gather(gathered, parts[group.rank()].contiguous(), group=group)
                for part, whole in zip(parts, gathered, strict=True):
                    part.copy_(whole)


def load_full(chunks: list[Any], full: dict[str, Tensor]) -> None:
    """Copy this rank's slices of ``full`` into its parameters.

    An optimizer that keeps its own copy of the weights must reload them afterwards
    (``MegatronOptimizer.reload_model_params``).
    """
    with torch.no_grad():
        for shard in _shards(chunks, lambda p: p.data):
            if shard.name not in full:
                raise KeyError(f"the full state has no {shard.name}")
            if tuple(full[shard.name].shape) != shard.full_shape:
                raise ValueError(f"{shard.name}: {tuple(full[shard.name].shape)} given, {shard.full_shape} expected")
            shard.data.copy_(full[shard.name][shard.index])


def assemble(ranks: list[list[Shard]], replica_tolerance: float = 0.0) -> dict[str, Tensor]:
    """The full tensors from every rank's shards.

    Copies of one element may differ by at most ``replica_tolerance`` times the largest magnitude in the shard; with
    the default they are bit-identical.

    Raises:
        AssertionError: copies disagree, shapes disagree, or an element is on no rank.
    """
    full: dict[str, Tensor] = {}
    owner: dict[str, Tensor] = {}  # which rank wrote each element; -1: none yet
    for rank, shards in enumerate(ranks):
        for shard in shards:
            if shard.name not in full:
                full[shard.name] = torch.zeros(shard.full_shape, dtype=shard.data.dtype)
                owner[shard.name] = torch.full(shard.full_shape, -1, dtype=torch.int64)
            assert tuple(full[shard.name].shape) == shard.full_shape, (
                f"{shard.name} is {tuple(full[shard.name].shape)} on one rank and {shard.full_shape} on rank {rank}"
            )
            target, writer = full[shard.name][shard.index], owner[shard.name][shard.index]
            seen = writer >= 0
            if seen.any():
                difference = (target - shard.data).abs()[seen].max().item()
                allowed = replica_tolerance * target.abs().max().item()
                assert difference <= allowed, (
                    f"{shard.name}: the copy on rank {rank} differs by {difference:.3g} from that on rank(s) "
                    f"{sorted(set(writer[seen].tolist()))}, {allowed:.3g} allowed"
                )
            full[shard.name][shard.index] = torch.where(seen, target, shard.data)
            owner[shard.name][shard.index] = torch.where(seen, writer, rank)
    for name, writer in owner.items():
        assert (writer >= 0).all(), f"{name}: {int((writer < 0).sum())} elements are on no rank"
    return full


def _shards(chunks: list[Any], of: Callable[[Tensor], Tensor | None]) -> Iterator[Shard]:
    """Where each parameter of ``chunks`` lies, with ``of(parameter)`` as data (views where ``of`` gives the storage).

    A parameter for which ``of`` gives None is left out.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for chunk in chunks:
        left = {id(p): name for name, p in chunk.named_parameters()}
        # With one key per layer, and not one stacked tensor for all layers, names carry the global layer number.
        for entry in chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values():
            if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or id(entry.data) not in left:
                continue  # buffers and opaque objects
            left.pop(id(entry.data))
            data = of(entry.data)
            if data is None:
                continue
            if isinstance(entry, ShardedTensorFactory):  # SwiGLU: gate and up are cut separately
                pieces = entry.build_fn(entry.key, data, entry.replica_id, entry.flattened_range)
            else:
                pieces = [replace(entry, data=data, dtype=data.dtype)]
            for piece in pieces:
                assert piece.prepend_axis_num == 0, piece
                bounds = tuple(
                    (start, start + size) for start, size in zip(piece.global_offset, piece.local_shape, strict=True)
                )
                yield Shard(_plain_name(piece.key), tuple(piece.global_shape), bounds, piece.data)
        assert not left, f"in no sharded state dict: {sorted(left.values())}"


def _plain_name(key: str) -> str:
    for fused, plain in NORM_NAMES.items():
        key = re.sub(fused, plain, key)
    return key
