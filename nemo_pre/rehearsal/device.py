"""A GPU that is not there: its tensors are fake, those of the host are real, and layouts remember their values.

What a run computes of token ids (layouts, indices, masks) is computed on the host and copied to the device. So a fake
tensor of few enough elements keeps a real twin, and what follows from twins alone is worked out for real beside the
fake: ``nonzero``, boolean indices and ``.item()`` of a layout have their true answers. Of what depends on weights or
pictures there is none; where the host asks for such a float it is told 1, and for such an integer the rehearsal stops.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from nemo_pre.compat.rehearsed_device import DEVICE, TWIN
from nemo_pre.rehearsal.groups import GIVEN, Groups
from nemo_pre.rehearsal.lines import line_of_code
from nemo_pre.rehearsal.memory import Memory

aten = torch.ops.aten
MOST_INTEGERS, MOST_FLOATS = 1 << 22, 1 << 16  # elements of a twin
MOST_COPIED = 4096  # elements of unknown values that may go to the host
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten._unique2.default,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "set_"}


class UnknownValue(RuntimeError):
    """The host asks for a value that follows from weights or pictures, which a rehearsal does not have."""


class Rehearsed(TorchDispatchMode):
    """The device of one rehearsed rank; what happens on it is counted while the mode is entered.

    Attributes:
        memory: what it holds.
        groups: the rank's process groups.
        phase: :data:`~nemo_pre.rehearsal.calls.SETUP`, or the number of the step.
        kernels: by phase, calls that launch at least one kernel; fused and composite ones count once.
        flops: by phase, of matrix products and attention.
        waits: by phase and line, how often the host waits for the device.
        copies: by phase and line, copies from the host to the device.
        both: by phase and line, calls that are given tensors of both.
        guesses: by line, values that the host was told and nothing real says.
    """

    def __init__(self, groups: Groups, memory: Memory | None = None) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.memory = memory or Memory()
        self.groups = groups
        self.kernels: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.waits: dict[str, Counter[str]] = {}
        self.copies: dict[str, Counter[str]] = {}
        self.both: dict[str, Counter[str]] = {}
        self.guesses: Counter[str] = Counter()
        self._all_fake = False
        self._counting = True

    @property
    def phase(self) -> str:
        return self.groups.phase

    def __enter__(self) -> Rehearsed:
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        torch._C._set_only_lift_cpu_tensors(False)

    @contextlib.contextmanager
    def building(self) -> Iterator[None]:
        """Tensors that are made of nothing on the host are fake too: weights on their way to the device."""
        before, self._all_fake = self._all_fake, True
        try:
            yield
        finally:
            self._all_fake = before

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is computed inside is the rehearsal's own, and not counted."""
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def count_flops(self, flops: float) -> None:
        self.flops[self.phase] += int(flops)

    # --- one call ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        kwargs = kwargs or {}
        tensors: list[torch.Tensor] = []
        _collect(args, tensors)
        if kwargs:
            _collect(kwargs.values(), tensors)
        if func.namespace == "c10d":
            return self.groups.call(func, args, tensors)
        to = kwargs.get("device")
        to = None if to is None else torch.device(to).type
        has_fake = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        makes_fake = self._all_fake and (not tensors or to is not None)
        if not has_fake and to != "cuda" and not makes_fake:
            return func(*args, **kwargs)
        if self._counting:
            self._note(func, args, tensors, to)
        real = self._real(func, args, kwargs, tensors, has_fake, to == "cuda")
        if func is aten._local_scalar_dense.default:
            return real if real is not None else self._asked(args[0])
        if func is aten.equal.default:
            return real if real is not None else True
        if func is aten._to_copy.default and to == "cpu" and has_fake:
            return self._to_host(args[0], real, kwargs)
        if func in INDEXED and real is None:
            args = (args[0], self._masks_as_numbers(args[1]), *args[2:])
        out = self._fake(func, args, kwargs, tensors, real)
        self._keep_twins(func, args, out, real)
        made: list[torch.Tensor] = []
        _collect([out], made)
        for tensor in made:
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda":
                self.memory.see(tensor)
        if self._counting and func._overloadpacket in flop_registry:
            self.count_flops(flop_registry[func._overloadpacket](*args, **kwargs, out_val=out))
        return out

    def _fake(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], real: Any) -> Any:
        """The call's fake result, which torch's own shape rules say; or as ``real`` is shaped where they cannot."""
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                tensor.constant = None  # torch's own memory of values, which it would compute with on the device
        if not all(isinstance(tensor, FakeTensor) for tensor in tensors):
            args, kwargs = tree_map(self._faked, (args, kwargs))
        try:
            with self.fake:
                return _CONVOLUTIONS.get(func, func)(*args, **kwargs)
        except Exception as error:
            kind = type(error).__name__
            if "DynamicOutputShape" not in kind and "DataDependent" not in kind:
                raise
            if real is None:
                raise UnknownValue(f"{func} depends on values that a rehearsal does not have.") from error
        on = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), DEVICE)

        def like(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=on)

        with self.fake:
            return tree_map(like, real)

    def _faked(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor):
            return self.fake.fake_tensor_converter.from_real_tensor(self.fake, leaf)
        return leaf

    # --- values that are known --------------------------------------------------------------------------------------

    def _real(
        self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], has_fake: bool, to_device: bool
    ) -> Any:
        """The call's real result, where it follows from twins alone; else None."""
        if not all(_twin(tensor) is not None for tensor in tensors):
            return None
        if tensors and not has_fake and not _small(tensors[0]):
            return None
        if not tensors and not _makes_few(func, args, kwargs):
            return None
        given, options = tree_map(lambda leaf: _twin(leaf) if isinstance(leaf, torch.Tensor) else leaf, (args, kwargs))
        options = {key: value for key, value in options.items() if key != "pin_memory"}
        if options.get("device") is not None:
            options["device"] = torch.device("cpu")
        return func(*given, **options)

    def _keep_twins(self, func: Any, args: Any, out: Any, real: Any) -> None:
        if real is None:
            if func._schema.is_mutable:
                for tensor, argument in zip(args, func._schema.arguments, strict=False):
                    written = argument.alias_info is not None and argument.alias_info.is_write
                    if isinstance(tensor, FakeTensor) and written:
                        setattr(tensor, TWIN, None)
                        setattr(tensor, GIVEN, None)
            return
        fakes = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        reals = [leaf for leaf in tree_leaves(real) if isinstance(leaf, torch.Tensor)]
        for fake, value in zip(fakes, reals, strict=True):
            if isinstance(fake, FakeTensor) and _small(value):
                setattr(fake, TWIN, value)

    def _masks_as_numbers(self, indices: Any) -> list[Any]:
        """Boolean indices whose values are known, as the numbers of what they choose."""
        found: list[Any] = []
        for index in indices:
            if index is None or index.dtype is not torch.bool or _twin(index) is None:
                found.append(index)
                continue
            for numbers in _twin(index).nonzero(as_tuple=True):
                with self.fake:
                    fake = torch.empty(numbers.shape, dtype=numbers.dtype, device=index.device)
                setattr(fake, TWIN, numbers)
                found.append(fake)
        return found

    def _to_host(self, tensor: torch.Tensor, real: Any, kwargs: Any) -> torch.Tensor:
        if real is not None:
            return real
        dtype = kwargs.get("dtype") or tensor.dtype
        if tensor.numel() > MOST_COPIED or tensor.device.type != "cuda":
            with self.fake:
                return torch.empty(tensor.shape, dtype=dtype)
        if not dtype.is_floating_point:
            raise UnknownValue(f"Integers that a rehearsal does not know go to the host at {line_of_code(3)}.")
        self.guesses[line_of_code(2)] += 1
        return torch.ones(tensor.shape, dtype=dtype)

    def _asked(self, tensor: torch.Tensor) -> float | bool:
        reduced = None if tensor.dtype.is_floating_point else self.groups.reduced(tensor)
        return self._guess(tensor) if reduced is None else reduced.item()

    def _guess(self, tensor: torch.Tensor) -> float | bool:
        self.guesses[line_of_code(2)] += 1
        if tensor.dtype is torch.bool:
            return False
        if tensor.dtype.is_floating_point:
            return 1.0
        raise UnknownValue(f"The host asks for an integer that a rehearsal does not know at {line_of_code(3)}.")

    # --- counting ---------------------------------------------------------------------------------------------------

    def _note(self, func: Any, args: Any, tensors: list[torch.Tensor], to: str | None) -> None:
        on_device = any(isinstance(t, FakeTensor) and t.fake_device.type == "cuda" for t in tensors)
        if (on_device or to == "cuda") and _launches(func):
            self.kernels[self.phase] += 1
        if on_device and self._waits(func, args, to):
            self.waits.setdefault(self.phase, Counter())[line_of_code(2)] += 1
            self.groups.log.sync()
        if not tensors:
            return
        on_host = [t for t in tensors if (t.fake_device if isinstance(t, FakeTensor) else t.device).type == "cpu"]
        copies = func in (aten._to_copy.default, aten.copy_.default)
        if copies and on_host and (to == "cuda" or on_device):
            self.copies.setdefault(self.phase, Counter())[line_of_code(2)] += 1
        elif on_device and on_host and not _fills(func, args):
            self.both.setdefault(self.phase, Counter())[f"{line_of_code(2)} ({func})"] += 1

    @staticmethod
    def _waits(func: Any, args: Any, to: str | None) -> bool:
        """Whether the host must have the device's answer before it goes on."""
        if func is aten._to_copy.default:
            return to == "cpu"
        if func is aten.copy_.default:
            return args[0].device.type == "cpu" and args[1].device.type == "cuda"
        if func in INDEXED:
            return not _fills(func, args) and any(
                index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
            )
        return func in WAITS


def _fills(func: Any, args: Any) -> bool:
    """Whether an assignment to a mask is of a number, which torch makes a ``masked_fill_`` of, without a wait."""
    if func not in (aten.index_put_.default, aten.index_put.default):
        return False
    value = args[2]
    return value.numel() == 1 and value.device.type == "cpu"


def _collect(values: Any, found: list[torch.Tensor]) -> None:
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            _collect(value, found)


def _twin(tensor: torch.Tensor) -> Any:
    return getattr(tensor, TWIN, None) if isinstance(tensor, FakeTensor) else tensor


def _small(tensor: torch.Tensor) -> bool:
    floats = tensor.dtype.is_floating_point or tensor.dtype.is_complex
    return tensor.numel() <= (MOST_FLOATS if floats else MOST_INTEGERS)


def _makes_few(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call that is given no tensor makes a small one whose values follow from its arguments."""
    name = func.__name__
    if "rand" in name or "normal" in name or name.startswith("empty"):
        return False
    size = args[0] if args and isinstance(args[0], (list, tuple, torch.Size)) else None
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    elements = 1
    for side in size or ():
        elements *= side
    return elements <= (MOST_FLOATS if size is not None and dtype.is_floating_point else MOST_INTEGERS)


_LAUNCHES: dict[Any, bool] = {}


def _launches(func: Any) -> bool:
    """Whether the call runs a kernel: no view, and more than memory."""
    if func not in _LAUNCHES:
        views = any(out.alias_info is not None and not out.alias_info.is_write for out in func._schema.returns)
        _LAUNCHES[func] = not views and func._schema.name.split("::")[1] not in NO_KERNEL
    return _LAUNCHES[func]


# --- convolutions, without asking the device which of its kernels it would take --------------------------------------


def _convolution(
    image: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: Any, _: Any, groups: Any
) -> torch.Tensor:
    assert not transposed, "no tower has a transposed convolution"
    _same_kind(image, weight, bias)
    if image.shape[1] != weight.shape[1] * groups:
        raise RuntimeError(f"A convolution of {list(weight.shape)} is given {list(image.shape)}.")
    dims = image.dim() - 2
    steps, pads, spread = (list(each) * dims if len(each) == 1 else list(each) for each in (stride, padding, dilation))
    sides = [
        (size + 2 * pad - dilated * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dilated in zip(
            image.shape[2:], weight.shape[2:], steps, pads, spread, strict=True
        )
    ]
    return image.new_empty(image.shape[0], weight.shape[0], *sides)


def _convolution_backward(grad: Any, image: Any, weight: Any, *options: Any) -> tuple[Any, ...]:
    _same_kind(grad, image, weight)
    mask = options[-1]
    return (
        torch.empty_like(image) if mask[0] else None,
        torch.empty_like(weight) if mask[1] else None,
        grad.new_empty(weight.shape[0]) if mask[2] else None,
    )


def _same_kind(*tensors: Any) -> None:
    kinds = {(str(tensor.device), str(tensor.dtype)) for tensor in tensors if tensor is not None}
    if len(kinds) > 1:
        raise RuntimeError(f"A convolution is given tensors of {' and '.join(map(' '.join, sorted(kinds)))}.")


_CONVOLUTIONS = {aten.convolution.default: _convolution, aten.convolution_backward.default: _convolution_backward}
