"""The metadata of a checkpoint: which tensors and objects lie where in its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

from nemo_pre.checkpoint_files.pickles import UnsafePickle, load_metadata

WEIGHTS = "weights"
METADATA, COMMON, BACKENDS, MODEL_OPTIMIZER = ".metadata", "common.pt", "metadata.json", "modelopt_state"
# What Megatron-Core 0.15 writes beside the tensors, and asks for when it loads; 0.19 has no file of common state, and
# does not speak of one.
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

Wanted = Callable[[str], bool]  # whether a tensor or object of this name is going to be read


def everything(key: str) -> bool:
    return True


def weights_only(key: str) -> bool:
    """What of a checkpoint is the model's: its optimizer's tensors begin with its own name."""
    return not key.startswith("optimizer")


def read_metadata(weights: str | Path) -> Metadata:
    """The metadata in a ``weights`` directory.

    Raises:
        UnsafePickle: they name something else than the classes of metadata, or files elsewhere.
        FileNotFoundError: there are none.
        ValueError: they are damaged.
    """
    path = Path(weights) / METADATA
    with path.open("rb") as file:
        found = load_metadata(file, path)
    if not isinstance(found, Metadata) or not isinstance(found.state_dict_metadata, dict):
        raise ValueError(f"{path} cannot be read: it describes no tensors")
    if not isinstance(found.storage_data, dict):
        raise ValueError(f"{path} cannot be read: it names no files")
    for index, place in found.storage_data.items():
        if not (isinstance(index, MetadataIndex) and isinstance(place, _StorageInfo)):
            raise ValueError(f"{path} cannot be read: it names no files")
        name = getattr(place, "relative_path", None)
        if not (isinstance(name, str) and isinstance(place.offset, int) and isinstance(place.length, int)):
            raise ValueError(f"{path} cannot be read: it does not say where {index.fqn} lies")
        if name != Path(name).name or name in (".", "..") or getattr(place, "transform_descriptors", None):
            raise UnsafePickle(f"{path} looks for {index.fqn} in {name!r}, which is no file of the checkpoint.")
    return found


def check_backends(weights: str | Path) -> bool:
    """Refuse a checkpoint that Megatron would read with other readers than those this module has checked it for.

    Returns:
        Whether what is common to all ranks lies in a file of its own.

    Raises:
        FileNotFoundError: it does not say which.
        ValueError: it wants others, or the file is damaged.
    """
    path = Path(weights) / BACKENDS
    try:
        found = json.loads(path.read_text())
        backends = {name: found.get(name, default) for name, default in FORMAT.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: it is no JSON of a checkpoint's format") from error
    if backends != FORMAT:
        raise UnsafePickle(f"{path} asks for a reader of another format ({found}) than nemo-pre's: it is not read.")
    if (Path(weights) / MODEL_OPTIMIZER).exists():
        raise UnsafePickle(
            f"{Path(weights) / MODEL_OPTIMIZER} would be unpickled by NVIDIA's Model Optimizer, which runs what it "
            f"names, and nemo-pre writes none: remove it."
        )
    return "common_backend" in found or (Path(weights) / COMMON).exists()


def places(metadata: Metadata, wanted: Wanted) -> Iterator[tuple[str, bool, _StorageInfo]]:
    """The name of each stored part that is wanted, whether it is an object (or a tensor's part), and where it lies."""
    entries: dict[str, Any] = metadata.state_dict_metadata
    for index, place in metadata.storage_data.items():
        if wanted(index.fqn):
            yield index.fqn, isinstance(entries.get(index.fqn), BytesStorageMetadata), place
