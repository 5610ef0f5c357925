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

from nemo_pre.huggingface.config_fields import listed, read_json, short
from nemo_pre.huggingface.own_files import own_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED_INDEX = "pytorch_model.bin.index.json"
# safetensors' names of the types that weights have
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class TensorSource:
    """The tensors of a directory: safetensors, read lazily.

    Args:
        allow_pickle: also read ``pytorch_model*.bin``, with ``weights_only``.

    Raises:
        ValueError: no weights, a missing or broken file, one outside the directory, or pickled weights that are not
            allowed.
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
        single, index = (self.directory / name for name in (SINGLE, INDEX))
        if single.is_file() and index.is_file():
            raise ValueError(f"{self.directory} has {SINGLE} and {INDEX}: remove the one that does not belong there.")
        if index.is_file():
            return self._indexed(INDEX, _opened)
        if single.is_file():
            return self._together([SINGLE], _opened)
        pickled = sorted(path.name for path in self.directory.glob("pytorch_model*.bin"))
        if not pickled:
            raise ValueError(
                f"{self.directory} has neither {SINGLE} nor {INDEX}: name a downloaded Hugging Face model."
            )
        if not allow_pickle:
            raise ValueError(
                f"{self.directory / pickled[0]} is a pickle, which may run code when it is read: convert it to "
                f"safetensors, or give allow_pickle=true if you trust it."
            )
        if (self.directory / PICKLED_INDEX).is_file():
            return self._indexed(PICKLED_INDEX, _unpickled)
        return self._together(pickled, _unpickled)

    def _indexed(self, name: str, opened: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        """The tensors of the files that an index names, all of which it must name."""
        index = own_file(self.directory, name)
        expected = read_json(index).get("weight_map")
        if not isinstance(expected, dict) or not all(isinstance(file, str) and file for file in expected.values()):
            raise ValueError(f"{index} has no weight_map from tensors to files: download it again.")
        found = self._together(sorted(set(expected.values())), opened)
        missing = sorted(set(expected) - set(found))
        if missing:
            raise ValueError(
                f"{index} names {listed(missing)}, which is not in {expected[missing[0]]}: download it again."
            )
        return found

    def _together(self, files: list[str], opened: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for file in files:
            tensors = opened(own_file(self.directory, file))
            twice = sorted(found.keys() & tensors.keys())
            if twice:
                raise ValueError(f"{listed(twice)} is in {file} of {self.directory} and in another file: remove one.")
            found |= tensors
        return found


def _opened(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        tensors = safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is missing or broken ({error}): download it again.") from error
    return dict.fromkeys(tensors.keys(), tensors)


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
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged pickle makes of it
        raise ValueError(
            f"{path} is missing, broken, or more than tensors, which weights_only refuses ({short(error)}): convert "
            f"it to safetensors."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by name: convert it to safetensors.")
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
