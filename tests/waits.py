"""Finds where the host waits for the device, without one: the device is ``meta``, whose tensors have no values.

What asks it for a value (``.item()``, ``.tolist()``, a mask as an index, ``nonzero``, ``unique``, a copy to the host)
is an error of PyTorch's. What ``meta`` would let pass is an error here: copies to the device from memory that is not
pinned, lists that become tensors there, and indices on the host. The traceback says in which line.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_pre import device_copies

DEVICE = torch.device("meta")
aten = torch.ops.aten


class Waits(RuntimeError):
    """The host would wait for the device here."""


def of_device(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == DEVICE.type


def on_host(value: Any) -> bool:
    """A tensor with several values in the host's memory; a number goes along with a kernel's launch."""
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.dim() > 0


class _Lists(TorchFunctionMode):
    """``torch.tensor(values, device=...)`` makes the tensor on the host and copies it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None
        if made and torch.device(kwargs["device"]).type == DEVICE.type and not isinstance(args[0], torch.Tensor):
            raise Waits(f"{func.__name__} of {args[0]} on the device")
        if func is torch.Tensor.new_tensor and of_device(args[0]):
            raise Waits(f"new_tensor of {args[1]} on the device")
        return func(*args, **kwargs)


class _Copies(TorchDispatchMode):
    """Copies to the device are from pinned memory, and nothing else takes tensors of both."""

    def __init__(self, pinned: set[int]) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device")
        if func is aten._to_copy.default and target is not None and torch.device(target).type == DEVICE.type:
            source = args[0]
            pinned = source.untyped_storage().data_ptr() in self.pinned and kwargs.get("non_blocking")
            if source.device.type == "cpu" and source.numel() and not pinned:
                raise Waits(f"{list(source.shape)} goes to the device from memory that is not pinned")
        elif any(map(of_device, tensors)) and any(map(on_host, tensors)):
            raise Waits(f"{func} of tensors on the host and on the device")
        return func(*args, **kwargs)


@contextlib.contextmanager
def no_waits() -> Iterator[None]:
    """Inside, the current device is :data:`DEVICE`, and waiting for it is an error."""
    pinned: set[int] = set()
    kept: list[torch.Tensor] = []  # an address belongs to no other tensor meanwhile

    def pin(tensor: torch.Tensor, *_: Any) -> torch.Tensor:
        kept.append(tensor.clone())
        pinned.add(kept[-1].untyped_storage().data_ptr())
        return kept[-1]

    with pytest.MonkeyPatch.context() as patched, _Lists(), _Copies(pinned):
        patched.setattr(device_copies, "WAITED_FOR", {DEVICE.type})
        patched.setattr(torch.cuda, "current_device", lambda: DEVICE)
        patched.setattr(torch.Tensor, "pin_memory", pin)
        yield
