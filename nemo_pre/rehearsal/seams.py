"""Where a rehearsal takes hold of the project's own code: named, reversible changes of a forked process.

Changes of torch, Megatron and NeMo are in :mod:`nemo_pre.compat`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from nemo_pre.compat.registry import Change, Patch, patch
from nemo_pre.compat.rehearsed_device import TWIN
from nemo_pre.compat.rehearsed_kernels import LowerRight, attention, pairs_of
from nemo_pre.rehearsal.device import MOST_INTEGERS, Rehearsed


def seams(device: Rehearsed, structures: int) -> Iterator[Patch]:
    """The changes in the order in which they are made.

    Args:
        structures: token structures that a step has on this rank, of all micro-batches and chunks.
    """
    yield _building(device)
    yield _flops_of_transformer_engine(device)
    yield _flex_attention(device)
    yield _remembered_masks(structures)
    yield _eager(device)


def _building(device: Rehearsed) -> Patch:
    @patch(
        "weights-are-fake",
        why="Encoder, projector and heads are made on the host and moved, and a 72B's would not fit there.",
        until="they are made on the device.",
    )
    def effects() -> Iterator[Change]:
        from nemo_pre.neva.model import VisualNevaConfig
        from nemo_pre.terms import frozen_vision
        from nemo_pre.terms.vision_facts import read_config, vision_part

        build = VisualNevaConfig.configure_model

        def configure_model(self: Any, *args: Any, **kwargs: Any) -> Any:
            with device.building():
                return build(self, *args, **kwargs)

        def load_model(target: Any) -> Any:
            from transformers import AutoModel

            with device.building():
                whole = AutoModel.from_config(read_config(target), dtype=torch.float32)
            return vision_part(whole, target).eval().requires_grad_(False)

        yield Change(VisualNevaConfig, "configure_model", configure_model)
        yield Change(frozen_vision, "load_model", load_model)

    return effects


def _flops_of_transformer_engine(device: Rehearsed) -> Patch:
    @patch(
        "flops-of-transformer-engine",
        why="Its stand-ins' attention and products in FP8 are no operations of torch.",
        until="torch's flop counter knows them.",
    )
    def effects() -> Iterator[Change]:
        from nemo_pre.compat import rehearsed_te_layers

        yield Change(rehearsed_te_layers, "count_flops", device.count_flops)

    return effects


def _flex_attention(device: Rehearsed) -> Patch:
    @patch(
        "attention-is-not-compiled",
        why="FlexAttention is compiled for the device.",
        until="a compiled kernel says what it keeps.",
    )
    def effects() -> Iterator[Change]:
        from nemo_pre.neva import mixed_attention, split_attention

        def attend(
            query: Any, key: Any, value: Any, block_mask: Any, scale: Any = None, enable_gqa: bool = False
        ) -> Any:
            return attention(query, key, value, block_mask.pairs, device.count_flops)

        counted: dict[Any, float] = {}  # by the rule's tokens: micro-batches, chunks and steps have the same

        def create(
            rule: Any, batch: int, heads: Any, queries: int, keys: int, device: Any = None, count: Any = device
        ) -> Any:
            shape = (batch, 1, -(-queries // 128), -(-keys // 128))
            # What a BlockMask holds: the numbers and the places of partial and of full blocks, both ways.
            blocks = [torch.empty(shape, dtype=torch.int32, device=device) for _ in range(4)]
            asked = (batch, queries, keys, _tokens_of(rule))
            if asked not in counted:
                counted[asked] = _visible(count, rule, batch, queries, keys, device)
            return SimpleNamespace(pairs=counted[asked], blocks=blocks)

        yield Change(mixed_attention, "_compiled_flex", lambda: (attend, create))
        yield Change(split_attention, "causal_lower_right", LowerRight)

    return effects


def _remembered_masks(structures: int) -> Patch:
    @patch(
        "a-step-fills-the-masks-memory",
        why="The latest masks are remembered, more than a rehearsed step has: what the second step adds to them would"
        " look like a leak.",
        until="a rehearsal runs as many steps as fill it.",
    )
    def effects() -> Iterator[Change]:
        from nemo_pre.neva import mixed_attention

        number = min(structures, mixed_attention.REMEMBERED_MASKS)
        yield Change(mixed_attention, "REMEMBERED_MASKS", number)

    return effects


def _tokens_of(rule: Callable[..., Any]) -> tuple[Any, ...]:
    """What a rule knows of tokens, to tell rules apart: the values of its tensors, or the rule itself."""
    found = [cell.cell_contents for cell in rule.__closure__ or ()]
    twins = [getattr(value, TWIN, None) if isinstance(value, torch.Tensor) else value for value in found]
    if any(twin is None for twin in twins):
        return (rule,)
    return tuple(twin.numpy().tobytes() if isinstance(twin, torch.Tensor) else twin for twin in twins)


def _visible(device: Rehearsed, rule: Callable[..., Any], batch: int, queries: int, keys: int, on: Any) -> float:
    """How many pairs of tokens the rule lets see each other; an estimate where its structure is not known."""
    pairs = 0.0
    at_once = max(MOST_INTEGERS // keys, 1)
    with device.aside():
        k = torch.arange(keys, device=on)
        for row in range(batch):
            b = torch.full((), row, dtype=torch.int64, device=on)
            for start in range(0, queries, at_once):
                q = torch.arange(start, min(start + at_once, queries), device=on)[:, None]
                seen = getattr(rule(b, b, q, k), TWIN, None)
                if seen is None:
                    return batch * pairs_of(queries, keys, causal=True)
                pairs += float(seen.sum())
    return pairs


def _eager(device: Rehearsed) -> Patch:
    @patch(
        "averages-are-not-compiled",
        why="The moving averages' kernel is compiled for the device; it is one kernel.",
        until="torch.compile runs on fake tensors without a compiler.",
    )
    def effects() -> Iterator[Change]:
        from nemo_pre.parallel import sharded_average

        def lerp(average: Any, tensor: Any, weight: Any) -> None:
            average.add_(0)  # reads and writes it once

        yield Change(sharded_average, "_compiled_lerp", lambda: lerp)

    return effects
