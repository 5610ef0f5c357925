"""Watches a rehearsed rank's steps: what stays, what a step adds at its peak, what is left behind."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from nemo_pre.rehearsal.calls import SETUP
from nemo_pre.rehearsal.device import Rehearsed
from nemo_pre.rehearsal.found import Found, Lines, Order


class Watch:
    """Fills in what a rank has ``found``; whoever trains tells it how far a step is, in the order of its methods."""

    def __init__(self, order: Order, device: Rehearsed, found: Found, progress: Callable[[str], None]) -> None:
        self.order, self.device, self.found, self.progress = order, device, found, progress
        self._at_start: set[int] = set()
        self._after: set[int] = set()

    def start(self, chunks: Iterable[Any]) -> None:
        """What is there before the first step stays, but for the optimizer's moments, which the first step makes."""
        self._at_start = self.device.memory.keys()
        for chunk in chunks:
            self._count_forward(chunk)
        self.device.memory.start_peak()

    def _count_forward(self, chunk: Any) -> None:
        """Have the FLOPs of the chunk's forward pass of the first step's first micro-batch counted."""
        number, device, counts = len(self.found.forward_flops), self.device, self.found.forward_flops
        counts.append(0)

        def enter(micro_batch: Any) -> None:
            if micro_batch.index == 0 and device.phase == "1":
                counts[number] -= device.flops["1"]

        def leave(module: Any, _: Any, output: Any) -> None:
            if module.micro_batch.index == 0 and device.phase == "1":
                counts[number] += device.flops["1"]

        chunk.on_micro_batch.insert(0, enter)
        chunk.register_forward_hook(leave)

    def begin(self, step: int) -> None:
        self.device.groups.phase = str(step)
        self.progress(f"step {step}")

    def before_update(self) -> None:
        self.found.kernels = self.device.kernels[self.device.phase]

    def after_step(self, models: Iterable[Any], optimizers: Sequence[Any]) -> None:
        """``models``: the rank's chunks in Megatron's wrappers."""
        gc.collect()
        memory, found = self.device.memory, self.found
        found.peaks.append(memory.most)
        found.held.append(memory.held)
        state = self._state(models, optimizers)
        staying = set().union(*state.values())
        staying |= self._at_start & memory.keys()
        held = memory.keys()
        found.state = {kind: memory.bytes_of(keys) for kind, keys in state.items()}
        found.state["others that stay"] = memory.bytes_of(staying) - sum(found.state.values())
        found.kept = memory.lines_of(held - staying)[:20]
        found.grown = [(line, size) for line, size in memory.lines_of(held - self._after) if size][:20]
        found.lines_at_peak = memory.lines_at_peak(staying)[:40]
        found.peak_line = memory.peak_line
        self._after = held
        memory.start_peak()

    def end(self) -> None:
        device, found, last = self.device, self.found, str(len(self.found.peaks))
        found.flops = device.flops[last]
        found.waits = at_most(device.waits.get(last))
        found.copies = at_most(device.copies.get(last))
        found.both = at_most(device.both.get(last))
        found.guesses = at_most(device.guesses)
        device.groups.phase = SETUP

    @staticmethod
    def _state(models: Iterable[Any], optimizers: Sequence[Any]) -> dict[str, set[int]]:
        """The storages of weights, gradients and the optimizer's state; each belongs to the first that names it."""
        kinds: dict[str, set[int]] = {"weights": set(), "gradients": set(), "optimizer": set(), "FP8 copies": set()}
        seen: set[int] = set()

        def add(kind: str, tensor: Any) -> None:
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cuda":
                key = tensor.untyped_storage()._cdata
                if key not in seen:
                    seen.add(key)
                    kinds[kind].add(key)

        for module in models:
            for wrapper in (module, getattr(module, "module", None)):
                buffers = vars(wrapper).get("buffers") if wrapper is not None else None
                more = vars(wrapper).get("expert_parallel_buffers") if wrapper is not None else None
                for buffer in [*(buffers or []), *(more or [])]:
                    add("gradients", buffer.grad_data)
                    add("weights", buffer.param_data)
            for name, parameter in torch.nn.Module.named_parameters(module):
                if not _is_averaged(name):
                    add("weights", parameter)
            for layer in torch.nn.Module.modules(module):
                copies = vars(layer).get("quantized_weight")
                for tensor in copies.tensors() if copies is not None else ():
                    add("FP8 copies", tensor)
        for core in optimizers:
            for one in getattr(core, "chained_optimizers", [core]):
                inner = getattr(one, "optimizer", None)
                if inner is None:  # a rank without a trained parameter
                    continue
                for group in inner.param_groups:
                    for parameter in group["params"]:
                        add("optimizer", parameter)
                for states in inner.state.values():
                    for value in states.values():
                        add("optimizer", value)
        return kinds


def at_most(counts: Counter[str] | None, number: int = 40) -> Lines:
    return (counts or Counter()).most_common(number)


def _is_averaged(name: str) -> bool:
    """Whether a parameter is an objective's moving average, which the plan counts by itself."""
    from nemo_pre.objectives.registry import known

    return any(prefix in name for objective in known().values() for prefix in objective.averaged)
