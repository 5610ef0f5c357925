"""torch as a rehearsal needs it: fake CUDA tensors on a machine without a GPU or a driver.

Applied only in the forked processes of :mod:`nemo_pre.rehearsal`, where nothing is allocated or computed on a device.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch.utils._device import _device_constructors

from nemo_pre.compat import versions
from nemo_pre.compat.cpu_device import NullEvent, NullStream, get_rng_state, manual_seed, set_rng_state
from nemo_pre.compat.registry import Change, Patch, patch

TWIN = "real_twin"  # attribute of a fake tensor: a real tensor with its values, where they are known
DEVICE = torch.device("cuda", 0)
_CUDA, _META = 1, 14  # c10::DeviceType


@dataclass(frozen=True)
class _Guard:
    """Where c10::impl::DeviceGuardImplInterface (c10/core/impl/DeviceGuardImplInterface.h) has the virtual functions
    of a device's guard, by their place.

    Attributes:
        streams: what gives or takes a stream. ``events``: what makes one, waits for it or ends it.
        count: of devices. ``slots``: of the table, with both destructors.
    """

    streams: tuple[int, ...]
    events: tuple[int, ...]
    count: int
    slots: int


# torch 2.11 has getStreamNativeHandle behind exchangeStream, and getDeviceCapability behind deviceCount.
GUARDS = {
    "2.9": _Guard(streams=(5, 6, 7, 8, 9), events=(10, 11, 12, 17), count=14, slots=23),
    "2.11": _Guard(streams=(5, 6, 7, 8, 9), events=(11, 12, 13, 19), count=15, slots=25),
}
_TYPE, _EXCHANGE_DEVICE, _GET_DEVICE, _SET_DEVICE = 0, 1, 2, 3  # in all of them
# at::CUDAHooksInterface, the same; its first functions are at::AcceleratorHooksInterface's, alike in all of them.
_IS_AVAILABLE, _HAS_PRIMARY_CONTEXT, _HOOK_SLOTS = 3, 4, 96


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", name))


class _NoOpGuard:
    """The meta device's guard, which does nothing, in CUDA's place, with its answers changed to "CUDA, device 0".

    Args:
        places: of its functions.
    """

    def __init__(self, places: _Guard) -> None:
        self._places = places

    def do(self) -> None:
        registry_name = "_ZN3c104impl26device_guard_impl_registryE"
        self._registry = (ctypes.c_void_p * (_META + 1)).in_dll(_library("libc10.so"), registry_name)
        address = self._registry[_META]
        assert address is not None
        meta = ctypes.c_void_p.from_address(address).value
        assert meta is not None
        places = self._places
        own = (ctypes.c_void_p * places.slots)(*(ctypes.c_void_p * places.slots).from_address(meta))
        # The meta device counts one device. The same 1 is, as a device's type, CUDA; as a device, cuda:0.
        for slot in (_TYPE, _EXCHANGE_DEVICE, _GET_DEVICE, *places.streams):
            own[slot] = own[places.count]
        for slot in places.events:
            own[slot] = own[_SET_DEVICE]  # does nothing
        guard = (ctypes.c_void_p * 1)(ctypes.addressof(own))
        self._kept = (own, guard)
        self._was = self._registry[_CUDA]
        self._registry[_CUDA] = ctypes.addressof(guard)

    def undo(self) -> None:
        self._registry[_CUDA] = self._was


class _NoPrimaryContext:
    """Autograd's thread of a device asks CUDA whether it has a context, which raises without a driver: it has none."""

    def do(self) -> None:
        find = _library("libtorch_cpu.so")._ZN2at6detail12getCUDAHooksEv
        find.restype = ctypes.c_void_p
        self._hooks = ctypes.c_void_p.from_address(find())
        assert self._hooks.value is not None
        self._was = self._hooks.value
        self._own = (ctypes.c_void_p * _HOOK_SLOTS)(*(ctypes.c_void_p * _HOOK_SLOTS).from_address(self._was))
        self._own[_HAS_PRIMARY_CONTEXT] = self._own[_IS_AVAILABLE]
        self._hooks.value = ctypes.addressof(self._own)

    def undo(self) -> None:
        self._hooks.value = self._was


@patch(
    "device-guard-without-driver",
    why="Autograd and torch's own streams ask CUDA's device guard for the current device, which raises without a"
    " driver, for fake tensors too.",
    until="torch 2.10's torch._C._ensureCUDADeviceGuardSet, which does the same where no GPU is, is in all versions"
    " that we support and does it where one is.",
    of={"torch": tuple(GUARDS)},
)
def device_guard_without_driver():
    found = versions.matching(str(versions.installed("torch")), tuple(GUARDS))
    assert found is not None, "the patch is of these versions"
    yield _NoOpGuard(GUARDS[found])
    yield _NoPrimaryContext()


class Counted(Protocol):
    """Who knows what the rehearsed device holds: bytes now, and the most since it was last asked to forget."""

    held: int
    most: int


@contextmanager
def _stream(stream: Any) -> Iterator[None]:
    yield


def _quiet() -> Callable[..., None]:
    """A function of its own for every name: torch's compiler refuses one function with two names."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        return None

    return nothing


class _Stream(NullStream):
    cuda_stream = 0
    device = DEVICE
    device_index = 0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None:
        return None


class _Event(NullEvent):
    def elapsed_time(self, other: Any) -> float:
        return 1.0


PROPERTIES = SimpleNamespace(
    name="a rehearsed GPU",
    major=9,
    minor=0,
    total_memory=80 * 1024**3,
    multi_processor_count=132,
    warp_size=32,
    max_threads_per_multi_processor=2048,
    regs_per_multiprocessor=65536,
    L2_cache_size=50 * 1024**2,
)
_TYPE_NAMES = {
    torch.float32: "Float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Half",
    torch.float64: "Double",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.bool: "Bool",
    torch.uint8: "Byte",
}


def cuda_without_gpu(devices: int, memory: Counted) -> Patch:
    """The patch that gives this process ``devices`` GPUs like an H100, whose memory is what ``memory`` counts."""

    @patch(
        "cuda-without-gpu",
        why="The training path asks torch.cuda for streams, events, random state and memory, and for pinned host"
        " memory; all of it raises without a GPU.",
        until="a rehearsal can be told to torch, such as by a registered fake CUDA runtime.",
        of={"torch": ("2.9", "2.11")},
    )
    def effects():
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "init": _quiet(),
            "_lazy_init": _quiet(),
            "_lazy_call": _quiet(),
            "device_count": lambda: devices,
            "current_device": lambda: 0,
            "set_device": _quiet(),
            "synchronize": _quiet(),
            "empty_cache": _quiet(),
            "ipc_collect": _quiet(),
            "current_stream": lambda device=None: _Stream(),
            "default_stream": lambda device=None: _Stream(),
            "stream": _stream,
            "Stream": _Stream,
            "Event": _Event,
            "get_device_properties": lambda device=None: PROPERTIES,
            "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
            "get_device_name": lambda device=None: PROPERTIES.name,
            "memory_allocated": lambda device=None: memory.held,
            "max_memory_allocated": lambda device=None: memory.most,
            "memory_reserved": lambda device=None: memory.held,
            "max_memory_reserved": lambda device=None: memory.most,
            "reset_peak_memory_stats": _quiet(),
            "memory_stats": lambda device=None: {},
            "is_bf16_supported": lambda including_emulation=True: True,
        }.items():
            yield Change(torch.cuda, name, value)
        for module in (torch.cuda, torch.cuda.random):
            yield Change(module, "get_rng_state", get_rng_state)
            yield Change(module, "set_rng_state", set_rng_state)
            yield Change(module, "manual_seed", manual_seed)
            yield Change(module, "manual_seed_all", manual_seed)
        for name in ("range_push", "range_pop"):
            yield Change(torch.cuda.nvtx, name, _quiet())
        yield Change(torch.Tensor, "pin_memory", lambda self, *args: self)
        yield Change(torch.Tensor, "record_stream", _quiet())
        _device_constructors()  # remembers torch's own functions, by which torch.device as a context knows them
        for name in ("tensor", "empty", "zeros", "ones", "full", "empty_like", "zeros_like"):
            yield Change(torch, name, _without_pinning(getattr(torch, name)))
        yield Change(torch.Tensor, "type", _type_with_device(torch.Tensor.type))

    return effects


def _without_pinning(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapped


def _in_one_copy(right: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor of the device becomes a list after one copy to the host; a fake one's elements would be asked for."""
    return lambda self: self.cpu().tolist() if self.device.type == "cuda" else right(self)


def _type_with_device(right: Callable[..., Any]) -> Callable[..., Any]:
    def type_of(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.device.type == "cuda":  # a fake parameter whose data were replaced says "meta"
            return f"torch.cuda.{_TYPE_NAMES[self.dtype]}Tensor"
        return right(self, *([] if dtype is None else [dtype]), *args, **kwargs)

    return type_of


@patch(
    "fake-data",
    why="Assigning to the data of a fake tensor leaves the device it says it is on as it was, and NeMo and Megatron"
    " move parameters by assigning to their data; a list of one asks for its elements one by one; and all of them say"
    " that they lie at one address, by which masks of different micro-batches are told apart. torch 2.11 keeps a weak"
    " reference to a detached tensor (2.9 to another object of it), and does not move a parameter that has one.",
    until="FakeTensor's data takes over the fake device, its tolist copies once, its data_ptr tells storages apart,"
    " and a parameter that is made of a detached one can be moved.",
    of={"torch": ("2.9", "2.11")},
)
def fake_data():
    import torch._subclasses.fake_tensor as fake_tensor

    def set_data(tensor: Any, value: Any) -> None:
        torch.Tensor.data.__set__(tensor, value)  # type: ignore[attr-defined]
        tensor.fake_device = value.fake_device
        setattr(tensor, TWIN, getattr(value, TWIN, None))

    getter = property(lambda tensor: torch.Tensor.data.__get__(tensor), set_data)  # type: ignore[attr-defined]
    yield Change(fake_tensor.FakeTensor, "data", getter)

    def address(tensor: Any) -> int:
        return tensor.untyped_storage()._cdata + tensor.storage_offset() * tensor.element_size()

    yield Change(fake_tensor.FakeTensor, "data_ptr", address)
    yield Change(fake_tensor.FakeTensor, "tolist", _in_one_copy(fake_tensor.FakeTensor.tolist))
    yield Change(fake_tensor, "init_gpu_context", _quiet())
    # Called where a result is made of a meta tensor that nobody else has: what is remembered of it is never asked for.
    yield Change(fake_tensor.FakeTensorConverter, "set_tensor_memo", _quiet())


@patch(
    "no-move-at-the-end",
    why="Lightning moves the model to the CPU when a fit ends, for which a fake model has no memory to move.",
    until="Lightning leaves a module where it is.",
    of={"nemo_toolkit": ("2.7.3",)},
)
def no_move_at_the_end():
    from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin

    yield Change(_DeviceDtypeModuleMixin, "cpu", lambda self: self)
