"""Weights of a Hugging Face directory, read tensor by tensor, and written in files of a given size."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# safetensors' names of the types that weights have
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource:
    """The tensors of a directory: safetensors, read lazily.

    Args:
        allow_pickle: also read ``pytorch_model*.bin``, with ``weights_only``.

    Raises:
        ValueError: no weights, a missing or broken file, or pickled weights that are not allowed.
    """

    def __init__(self, directory: str | Path, allow_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self._files = self._by_tensor(allow_pickle)

    def names(self) -> list[str]:
        return list(self._files)

    def describe(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype, without reading the values.

        Raises:
            ValueError: it does not hold floating-point numbers.
        """
        part = self._open(name).get_slice(name)
        if part.get_dtype() not in DTYPES:
            raise ValueError(
                f"{name} in {self.directory} holds {part.get_dtype()}: a weight has floating-point numbers."
            )
        return tuple(part.get_shape()), DTYPES[part.get_dtype()]

    def read(self, name: str) -> Tensor:
        return self._open(name).get_tensor(name)

    def _open(self, name: str) -> Any:
        return self._files[name]

    def _by_tensor(self, allow_pickle: bool) -> dict[str, Any]:
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory} is not a directory: name a downloaded Hugging Face model.")
        index = self.directory / INDEX
        if index.is_file():
            expected = json.loads(index.read_text())["weight_map"]
            found = self._opened(sorted(set(expected.values())))
            missing = sorted(set(expected) - set(found))
            if missing:
                raise ValueError(
                    f"{index} names {missing[0]}, which is not in {expected[missing[0]]}: download it again."
                )
            return found
        if (self.directory / SINGLE).is_file():
            return self._opened([SINGLE])
        pickled = sorted(self.directory.glob("pytorch_model*.bin"))
        if not pickled:
            raise ValueError(
                f"{self.directory} has neither {SINGLE} nor {INDEX}: name a downloaded Hugging Face model."
            )
        if not allow_pickle:
            raise ValueError(
                f"{pickled[0]} is a pickle, which may run code when it is read: convert it to safetensors, or give "
                f"allow_pickle=true if you trust it."
            )
        return {name: part for path in pickled for name, part in _unpickled(path).items()}

    def _opened(self, files: list[str]) -> dict[str, Any]:
        from safetensors import SafetensorError, safe_open

        found = {}
        for file in files:
            path = self.directory / file
            try:
                tensors = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} is missing or broken ({error}): download it again.") from error
            found.update(dict.fromkeys(tensors.keys(), tensors))
        return found


class _Loaded:
    """A tensor of a pickle, with the interface of an opened safetensors file."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def get_slice(self, name: str) -> _Loaded:
        return self

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return next((name for name, dtype in DTYPES.items() if dtype == self._tensor.dtype), str(self._tensor.dtype))

    def get_tensor(self, name: str) -> Tensor:
        return self._tensor


def _unpickled(path: Path) -> dict[str, _Loaded]:
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: _Loaded(tensor) for name, tensor in tensors.items()}


# --- writing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, because they are read together.

    Attributes:
        sizes: bytes of each, by name.
        make: makes them.
    """

    sizes: dict[str, int]
    make: Callable[[], dict[str, Tensor]]


def plan_files(groups: Iterable[Group], max_bytes: int) -> list[list[Group]]:
    """Groups in their order, cut into files of at most ``max_bytes``, or of one group if that is larger."""
    files: list[list[Group]] = []
    filled = 0
    for group in groups:
        size = sum(group.sizes.values())
        if not files or filled + size > max_bytes:
            files.append([])
            filled = 0
        files[-1].append(group)
        filled += size
    return files


def file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def made_files(files: list[list[Group]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of each file in turn; one file's are in memory at a time if the caller lets go of the last."""
    for groups in files:
        tensors: dict[str, Tensor] = {}
        for group in groups:
            tensors.update(group.make())
        yield tensors
        del tensors


def write_files(directory: Path, files: list[list[Group]], on_progress: Callable[[int], None]) -> None:
    """Write the files and, for more than one, their index.

    Args:
        on_progress: called with the bytes of each file when it is written.
    """
    from safetensors.torch import save_file

    weight_map, total = {}, 0
    for name, tensors in zip(file_names(len(files)), made_files(files), strict=True):
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        size = sum(tensor.nbytes for tensor in tensors.values())
        total += size
        tensors.clear()
        on_progress(size)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    os.sync()
