"""Unpicklers that know only the classes their files need.

A pickle calls whatever it names. Those in a checkpoint are read by unpicklers that look every name up in a list of
what torch, Megatron and Transformer Engine write there, and call nothing else.
"""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, BinaryIO

import torch

# The classes of a distributed checkpoint's metadata: plain data, which do nothing when they are made.
METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint.planner": ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    "megatron.core.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
    "torch": ("Size",),
    "collections": ("OrderedDict",),
}
PATHS = ("pathlib", "pathlib._local")  # whose classes become plain text
RECIPES = "transformer_engine.common.recipe"  # of FP8, in the state that Transformer Engine keeps beside its weights


class UnsafePickle(ValueError):
    """A pickle names something that its file does not need; nothing of it was called."""


def load_metadata(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    """What a ``.metadata`` file holds.

    Raises:
        UnsafePickle: it names something else than the classes of metadata.
        ValueError: it is damaged.
    """
    reader = _Restricted(file, path, _metadata_class)
    before = [(each, dict(vars(each))) for each in _known_classes()]
    found = _loaded(reader, path)
    for each, attributes in before:
        if dict(vars(each)) != attributes:  # which a pickle can set, of the classes it names
            raise UnsafePickle(f"{path} changes {each.__name__}, as no checkpoint does: it is not to be trusted.")
    return found


def load_plain(file: BinaryIO, path: str | os.PathLike[str]) -> Any:
    """What a file that ``torch.save`` wrote holds: tensors, numbers, texts and containers of them, in main memory.

    Raises:
        UnsafePickle: it names something else.
        ValueError: it is damaged.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        words = str(error)
        if "Unsupported" in words or "GLOBAL" in words or "not allowed" in words or "trusted" in words:
            raise UnsafePickle(_refusal(path, _named_in(words))) from error
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error
    except MemoryError:
        raise
    except Exception as error:  # whatever random bytes lead to
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def check_extra_state(content: bytes, path: str | os.PathLike[str]) -> None:
    """Refuse bytes that Transformer Engine would unpickle as a module's FP8 state, unless they hold just that.

    Raises:
        UnsafePickle: they name something else than tensors and FP8 recipes.
        ValueError: they are damaged.
    """
    _loaded(_Restricted(io.BytesIO(content), path, _state_class), path)


class _Restricted(pickle.Unpickler):
    def __init__(self, file: BinaryIO, path: str | os.PathLike[str], find: Callable[[str, str], Any | None]) -> None:
        super().__init__(file)
        self._path, self._find = path, find

    def find_class(self, module: str, name: str) -> Any:
        found = self._member if (module, name) == ("builtins", "getattr") else self._find(module, name)
        if found is None:
            raise UnsafePickle(_refusal(self._path, f"{module}.{name}"))
        return found

    def _member(self, kind: Any, name: str) -> Any:
        """A member of an enumeration, which some versions of Python write as an attribute of its class."""
        if isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__:
            return kind[name]
        raise UnsafePickle(_refusal(self._path, "builtins.getattr"))

    def persistent_load(self, reference: Any) -> Any:
        raise UnsafePickle(_refusal(self._path, "an object outside of it"))


def _loaded(reader: _Restricted, path: str | os.PathLike[str]) -> Any:
    try:
        return reader.load()
    except (UnsafePickle, MemoryError):
        raise
    except Exception as error:  # random bytes lead to every kind
        raise ValueError(f"{path} cannot be read: {_first_line(error)}") from error


def _refusal(path: str | os.PathLike[str], named: str) -> str:
    return (
        f"{path} names {named}, which could run code and which no checkpoint needs: nothing of it was run. Take the "
        f"checkpoint from where you know it is what its author wrote."
    )


def _named_in(words: str) -> str:
    """The global in torch's message, which is some lines of advice."""
    for opening in ("GLOBAL ", "Unsupported global: GLOBAL ", "Unsupported class ", "Unsupported operand "):
        if opening in words:
            return words.split(opening, 1)[1].split()[0].rstrip(".,:")
    return "something else than tensors, numbers and texts"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- which names a file needs ---------------------------------------------------------------------------------------


def _metadata_class(module: str, name: str) -> Any | None:
    if name in METADATA_CLASSES.get(module, ()):
        return getattr(importlib.import_module(module), name)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) == ("torch.serialization", "_get_layout"):
        return _layout
    if module in PATHS and name in ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath", "Path"):
        return _path
    return None


def _state_class(module: str, name: str) -> Any | None:
    if module == RECIPES:
        found = getattr(importlib.import_module(module), name, None) if "." not in name else None
        return found if isinstance(found, type) and found.__module__ == module else None
    if (module, name) == ("torch.storage", "_load_from_bytes"):
        return _storage
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) in (("torch._utils", "_rebuild_tensor_v2"), ("collections", "OrderedDict")):
        return getattr(importlib.import_module(module), name)
    return None


def _layout(name: str) -> torch.layout:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.layout):
        raise ValueError(f"{name} is no layout of a tensor")
    return found


def _path(*parts: str) -> str:
    return os.path.join("", *parts)


def _storage(content: bytes) -> Any:
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _known_classes() -> list[type]:
    return [
        getattr(sys.modules[module], name)
        for module, names in METADATA_CLASSES.items()
        if module in sys.modules
        for name in names
    ]
