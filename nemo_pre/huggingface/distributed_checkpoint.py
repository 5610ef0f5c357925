"""Megatron's distributed checkpoints, tensor by tensor: no model is built, no rank started, and of a 70B model one
weight is in memory at a time.

The format is PyTorch's (``torch.distributed.checkpoint``) with Megatron's conventions: a decoder layer's weight is row
``layer`` of one tensor ``[num_layers, ...]``, whatever the layout the checkpoint was saved at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemo_pre.checkpoint_files.metadata import FORMAT, WEIGHTS, read_metadata
from nemo_pre.compat.checkpoints import checksums_of_torchs_writer
from nemo_pre.config.schema import ModelConfig
from nemo_pre.huggingface.weights import Weight, checked_weights

CONTENT = {
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written.

    Attributes:
        key: its name in the checkpoint.
        layer, num_layers: its place in a tensor of all layers; None: a tensor of its own.
        shape, dtype: known before it is read.
        read: makes the tensor; called once, when its turn to be written comes.
    """

    key: str
    layer: int | None
    num_layers: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class CheckpointReader:
    """The tensors of a checkpoint directory.

    Raises:
        ValueError: it is not a complete checkpoint in this format.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.directory = Path(checkpoint)
        weights = self.directory / WEIGHTS
        self._storage = FileSystemReader(weights)
        try:
            self._metadata: Metadata = read_metadata(weights)
        except OSError as error:
            raise ValueError(
                f"{checkpoint} is not a complete checkpoint: {weights}/.metadata cannot be read."
            ) from error
        if not isinstance(self._metadata, Metadata):
            raise ValueError(f"{checkpoint} is not a complete checkpoint: {weights}/.metadata holds something else.")
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor, by key; a weight of the decoder's layers has the layers in front."""
        return {
            key: (tuple(entry.size), entry.properties.dtype)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def check(self, model: ModelConfig) -> list[Weight]:
        """Every weight of the model, all of which are there, in their shapes, and nothing else that inference needs.

        Raises:
            ValueError: as :func:`nemo_pre.huggingface.weights.checked_weights`.
        """
        return checked_weights(model, {key: shape for key, (shape, _) in self.tensors().items()}, self.directory)

    def read(self, key: str, layer: int | None = None) -> Tensor:
        """The tensor ``key``, or its part of one layer.

        Raises:
            ValueError: a file of the checkpoint is cut off or missing.
        """
        entry = self._metadata.state_dict_metadata[key]
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        part = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(key, entry, [part]))
        try:
            self._storage.read_data(plan, _Into(target)).wait()
        except MemoryError:
            raise
        except Exception as error:  # what torch makes of a damaged file, or of a pickle in it that it does not trust
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"{key} cannot be read from {self.directory}: {reason}") from error
        return target if layer is None else target[0]


class _Into(LoadPlanner):
    """Reads into one given tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        part = self._target
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dimension, start, length)
        return part

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError

    create_local_plan = create_global_plan = finish_plan = load_bytes = resolve_bytes = set_up_planner


def write_weights(directory: Path, tensors: Iterable[StoredTensor], on_progress: Callable[[int], None]) -> None:
    """Write ``directory/weights``, one tensor after another, and flush it to the disk.

    Args:
        on_progress: called with the bytes of each tensor when it is written.
    """
    checksums_of_torchs_writer.apply()
    weights = directory / WEIGHTS
    weights.mkdir(parents=True)
    save(
        {},
        storage_writer=FileSystemWriter(weights, single_file_per_rank=True, thread_count=1, sync_files=True),
        planner=_OneByOne(tensors, on_progress),
        no_dist=True,
    )
    torch.save({"content_metadata": CONTENT}, weights / "common.pt")
    (weights / "metadata.json").write_text(json.dumps(FORMAT))
    os.sync()


class _OneByOne(SavePlanner):
    def __init__(self, tensors: Iterable[StoredTensor], on_progress: Callable[[int], None]) -> None:
        self._tensors = {_place(tensor): tensor for tensor in tensors}
        self._on_progress = on_progress

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        pass

    def create_local_plan(self) -> SavePlan:
        return SavePlan([_write_item(index, tensor) for index, tensor in self._tensors.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        stored = self._tensors[write_item.index]
        tensor = stored.read()
        if tuple(tensor.shape) != stored.shape or tensor.dtype != stored.dtype:
            raise ValueError(
                f"{stored.key} became {list(tensor.shape)} {tensor.dtype}, not {list(stored.shape)} {stored.dtype}."
            )
        self._on_progress(tensor.nbytes)
        return tensor if stored.layer is None else tensor[None]


def _place(tensor: StoredTensor) -> MetadataIndex:
    offsets = [0] * len(tensor.shape)
    return MetadataIndex(tensor.key, torch.Size(offsets if tensor.layer is None else [tensor.layer, *offsets]))


def _write_item(index: MetadataIndex, tensor: StoredTensor) -> WriteItem:
    in_layer, whole = list(tensor.shape), list(tensor.shape)
    if tensor.layer is not None:
        in_layer, whole = [1, *tensor.shape], [tensor.num_layers, *tensor.shape]  # type: ignore[list-item]
    assert index.offset is not None
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(index.offset, torch.Size(in_layer)),
        properties=TensorProperties(dtype=tensor.dtype),
        size=torch.Size(whole),
    )
    return WriteItem(index, WriteItemType.SHARD, tensor_data=data)
