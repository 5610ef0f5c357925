"""torch on a machine without a GPU, for code that says "cuda"."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode, _get_current_function_mode

from nemo_pre.compat.registry import Change, patch

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)  # an ordinal is a GPU's


def _backward(tensor, gradient=None, retain_graph=None, create_graph=False, inputs=None):
    torch.autograd.backward(tensor, gradient, retain_graph, create_graph, inputs=inputs)


class CudaMeansCpu(TorchFunctionMode):
    """Answers every request for a CUDA tensor with a CPU tensor."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.backward:
            with self:  # torch leaves the mode inside a handled call, where recomputed layers run
                return _backward(*args, **(kwargs or {}))
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if kwargs:
            if kwargs.get("device") is not None and _is_cuda(kwargs["device"]):
                kwargs = {**kwargs, "device": _CPU}
            if kwargs.get("pin_memory"):
                kwargs = {**kwargs, "pin_memory": False}
            return func(*args, **kwargs)
        return func(*args)


class _Mode:
    """Enter a TorchFunctionMode for good; leaving it needs it to be the innermost one."""

    def __init__(self, mode: TorchFunctionMode):
        self.mode = mode

    def do(self) -> None:
        self.mode.__enter__()

    def undo(self) -> None:
        assert _get_current_function_mode() is self.mode, "another TorchFunctionMode was entered and not left"
        self.mode.__exit__(None, None, None)


@patch(
    "cuda-device-is-cpu",
    why="Megatron-Core and NeMo write device='cuda', .cuda() and pin_memory=True at about 120 places in 40 files;"
    " one TorchFunctionMode turns them all into CPU tensors where single patches would be copies of those files.",
    until="Megatron-Core takes its device from the configuration.",
    of={"torch": ("2.9", "2.11")},
)
def cuda_device_is_cpu():
    yield _Mode(CudaMeansCpu())


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
