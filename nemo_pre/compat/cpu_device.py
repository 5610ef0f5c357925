"""torch on a machine without a GPU, for code that says "cuda"."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._device import _device_constructors

from nemo_pre.compat.registry import Change, patch

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)  # an ordinal is a GPU's


def _on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """``make``, a function that is given a device by name, with a CPU tensor where a CUDA one is asked for."""

    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return make(*args, **kwargs)

    return made


def _moved(move: Callable[..., Any]) -> Callable[..., Any]:
    """``Tensor.to`` with the CPU in the place of a GPU."""

    @functools.wraps(move)
    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args and _is_cuda(args[0]):
            args = (_CPU, *args[1:])
        elif kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
            kwargs["device"] = _CPU
        return move(self, *args, **kwargs)

    return to


def _itself(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return self


@patch(
    "cuda-device-is-cpu",
    why="Megatron-Core and NeMo write device='cuda', .cuda() and pin_memory=True at about 120 places in 40 files; the"
    " functions of torch that make or move tensors answer with CPU tensors, where single patches would be copies of"
    " those files, and a TorchFunctionMode would take a fifth of a small model's step.",
    until="Megatron-Core takes its device from the configuration.",
    of={"torch": ("2.9", "2.11")},
)
def cuda_device_is_cpu():
    # torch keeps the set that it finds at the first call: it must be of its own functions, or `with torch.device(...)`
    # would not know them.
    constructors = _device_constructors()
    alike = {name for name in vars(torch) if name.endswith("_like") and not name.startswith("_")}
    for name, function in list(vars(torch).items()):
        if name in alike or (callable(function) and function in constructors):
            yield Change(torch, name, _on_cpu(function))
    for name in ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"):
        yield Change(torch.Tensor, name, _on_cpu(getattr(torch.Tensor, name)))
    yield Change(torch.Tensor, "to", _moved(torch.Tensor.to))
    yield Change(torch.Tensor, "cuda", _itself)
    yield Change(torch.Tensor, "pin_memory", _itself)


class NullStream:
    """A CUDA stream where every operation has finished already."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    synchronize = wait_event = wait_stream = _nothing

    def record_event(self, event: Any = None) -> NullEvent:
        return event or NullEvent()

    def query(self) -> bool:
        return True


class NullEvent:
    """A CUDA event that has happened already."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


@patch(
    "no-cuda-runtime",
    why="The training path asks torch.cuda for the current device, streams and synchronisation, which raises without"
    " a GPU; with platform=cpu on a machine that has one, the GPU must stay unseen.",
    until="Megatron-Core guards these calls by torch.cuda.is_available().",
    of={"torch": ("2.9", "2.11")},
)
def no_cuda_runtime():
    for name, value in {
        "is_available": lambda: False,
        "device_count": lambda: 0,
        "current_device": lambda: _CPU,  # used as a device argument only
        "set_device": _nothing,
        "synchronize": _nothing,
        "empty_cache": _nothing,
        "current_stream": lambda device=None: NullStream(),
        "default_stream": lambda device=None: NullStream(),
        "stream": _stream,
        "Stream": NullStream,
        "Event": NullEvent,
    }.items():
        yield Change(torch.cuda, name, value)


def get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    """The state of the generator that fills CPU tensors; a copy, whatever ``clone`` says."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


@patch(
    "cuda-rng-is-cpu-rng",
    why="Megatron saves, sets and restores the CUDA generator around initialisation, dropout and recomputation; on"
    " CPU the tensors are filled by torch's default generator, so that is the one to save, set and restore.",
    until="Megatron-Core's RNG tracker takes a device.",
    of={"torch": ("2.9", "2.11")},
)
def cuda_rng_is_cpu_rng():
    for module in (torch.cuda, torch.cuda.random):
        yield Change(module, "get_rng_state", get_rng_state)
        yield Change(module, "set_rng_state", set_rng_state)
        yield Change(module, "manual_seed", manual_seed)


@patch(
    "no-compilation",
    why="Megatron decorates its fused kernels with torch.compile, which on CPU needs a C++ compiler that a bare"
    " machine lacks; run eagerly they give the same values.",
    until="torch.compile falls back by itself where no compiler is installed.",
    of={"torch": ("2.9", "2.11")},
)
def no_compilation():
    import torch._dynamo.config

    yield Change(torch._dynamo.config, "disable", True)


PATCHES = [cuda_device_is_cpu, no_cuda_runtime, cuda_rng_is_cpu_rng, no_compilation]
